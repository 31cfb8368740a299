"""Trained LoRA adapters in packed form, for the Hub or a folder: a few bits per parameter, quality measured."""
