"""A disk whose calls fail."""

import errno
import os


def fail_at(monkeypatch, name, number, error=errno.ENOSPC):
    """Make the `number`-th call of `os.<name>` (from 0) fail."""
    original, calls = getattr(os, name), [0]

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] - 1 == number:
            raise OSError(error, os.strerror(error))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
