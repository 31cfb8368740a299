"""Folder of an `evaluate` module: `evaluate.load` reads `meteor.py` in it, without network."""
