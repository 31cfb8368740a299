"""Adapters that somebody else made: what of their configuration is believed, and their size."""
