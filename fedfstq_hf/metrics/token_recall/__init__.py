"""Folder of an `evaluate` module: `evaluate.load` reads `token_recall.py` in it, without network."""
