"""The metrics' arithmetic: pure functions of strings and numbers, one per file, without `evaluate`."""
