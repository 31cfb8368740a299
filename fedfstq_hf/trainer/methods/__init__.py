"""Methods that change what a local step computes."""
