"""Files that somebody else wrote are parsed within bounds, and refused in words."""

from __future__ import annotations

import pytest

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.text import MAX_DEPTH, parse_object, printable


def test_an_object_is_what_json_says():
    assert parse_object(b'{"a": [1, 2.5, null, "x"]}', "The file", max_bytes=100) == {"a": [1, 2.5, None, "x"]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 18446744073709551616}',
        b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}",
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"a": "' + b"x" * 10**6 + b'"}',
    ],
)
def test_whatever_is_no_small_plain_object_is_refused(data):
    with pytest.raises(MailboxError, match=r"^The file "):
        parse_object(data, "The file", max_bytes=300000)


def test_the_deepest_nesting_that_passes():
    data = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse_object(data, "The file", max_bytes=1000)["a"]


def test_text_of_others_is_one_visible_line():
    assert printable("a\x1b[2J\r\nb\u202ec\ud800\u2028") == "a\\x1b[2J\\x0d\\x0ab\\u202ec\\ud800\\u2028"
    assert printable("ümlaut 中 😀") == "ümlaut 中 😀"
    assert printable("x" * 300, limit=10) == "x" * 7 + "..."
    assert printable(["\x07"], limit=20) == "['\\x07']"
