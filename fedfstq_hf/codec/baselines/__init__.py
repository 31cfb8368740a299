"""Codecs of other systems, one per file, to compare with on the same seeds and the same byte count."""
