"""parse_budget: hand-computed values, and errors that say what to type."""

import pytest

from fedfstq_hf.codec import parse_budget
from fedfstq_hf.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "num_params", "expected"),
    [
        ("96kB", 1, 96_000),
        ("96 kB", 1, 96_000),
        ("1.5kB", 1, 1_500),
        ("2MB", 1, 2_000_000),
        ("700B", 1, 700),
        ("700", 1, 700),
        (700, 1, 700),
        ("0.3bpp", 1_000, 37),  # 300 bits = 37.5 bytes, rounded down
        ("0.1bpp", 80, 1),
        ("0.7bpp", 1_000_000, 87_500),  # binary floating point would give 87499
        ("5s@2Mbps", 1, 1_250_000),
        ("250ms@64kbps", 1, 2_000),
        ("1min@8kbps", 1, 60_000),
    ],
)
def test_values(text, num_params, expected):
    assert parse_budget(text, num_params) == expected


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "kB",
        "96kb",
        "96KiB",
        "-5kB",
        "1e6",
        "0.3 bpp/round",
        "5s@",
        "5@2Mbps",
        "nan",
        "0B",
        0,
        -3,
        True,
        None,
        1.5,
        "0.001bpp",
    ],
)
def test_errors_say_what_to_type(bad):
    with pytest.raises(BudgetError, match='"96kB"'):
        parse_budget(bad, 100)
