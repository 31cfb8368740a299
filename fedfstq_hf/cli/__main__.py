"""`python -m fedfstq_hf.cli`."""

from fedfstq_hf.cli import main

main()
