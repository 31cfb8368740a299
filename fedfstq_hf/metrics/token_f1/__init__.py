"""Folder of an `evaluate` module: `evaluate.load` reads `token_f1.py` in it, without network."""
