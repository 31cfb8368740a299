"""Methods that change what a client's local steps compute, one file each: hooks.py says where they reach in."""
