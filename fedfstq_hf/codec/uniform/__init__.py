"""Codec `uniform`: format (grid), encoder (search, rounding) and codec, in that order of imports."""
