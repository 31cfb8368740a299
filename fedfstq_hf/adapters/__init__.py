"""Adapters that somebody else made: what of their configuration is believed, their size, their files."""
