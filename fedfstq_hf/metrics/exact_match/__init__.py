"""Folder of an `evaluate` module: `evaluate.load` reads `exact_match.py` in it, without network."""
