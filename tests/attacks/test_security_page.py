"""Every test that SECURITY.md names exists, and every file of hostile tests is named there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_tests_that_it_names_exist():
    named, last = 0, ""
    for name in re.findall(r"`([a-z_./]*::\w+|test_\w+\.py)`", PAGE):
        file, _, function = name.partition("::")
        last = file or last
        (found,) = (ROOT / "tests" / "attacks").rglob(last)
        assert not function or f"def {function}(" in found.read_text(encoding="utf-8"), name
        named += 1
    assert named > 30


def test_no_file_of_hostile_tests_is_left_out():
    files = {
        path.name
        for role in ("mailbox", "client", "reader", "file")
        for path in ROOT.glob(f"tests/attacks/{role}/*.py")
    }
    assert files - set(re.findall(r"test_\w+\.py", PAGE)) == set()
