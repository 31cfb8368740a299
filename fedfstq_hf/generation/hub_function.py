"""The `custom_generate/generate.py` to publish beside an adapter, for users without this package.

They run it with `trust_remote_code=True`, so it is code that whoever can write to the repo chooses. Recommend it with
`revision=` and the full sha of a commit only. Users of this package need it not: `TokenReducer.from_pretrained` reads
numbers from the repo, and runs no code of it.
"""

from __future__ import annotations

from importlib import resources

HUB_PATH = "custom_generate/generate.py"
"""Where transformers looks for it in a repo."""


def custom_generate_source() -> str:
    """Text of that file; it imports torch and transformers only."""
    return resources.files("fedfstq_hf.generation").joinpath(HUB_PATH).read_text(encoding="utf-8")
