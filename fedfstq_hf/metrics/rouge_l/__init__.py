"""Folder of an `evaluate` module: `evaluate.load` reads `rouge_l.py` in it, without network."""
