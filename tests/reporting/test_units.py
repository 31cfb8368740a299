import pytest

from fedfstq_hf.reporting.units import format_bytes, format_figure, format_ratio, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (7, "7.00 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (86_114_304, "86.1 MB"),
        (3.2e9, "3.20 GB"),
        (5e12, "5.00 TB"),
    ],
)
def test_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0 s"), (4.21, "4.21 s"), (119, "119 s"), (210, "3.50 min"), (7560, "2.10 h")]
)
def test_seconds(value, text):
    assert format_seconds(value) == text


def test_figures_and_ratios():
    assert format_figure(3.40512, None) == "3.405"
    assert format_figure(3.40512, 0.0123, digits=2) == "3.41 ± 0.01"
    assert format_figure(None, None) == "–"
    assert [format_ratio(value) for value in (None, 2.4, 46.04, 131.2)] == ["–", "2.40×", "46.0×", "131×"]
    assert format_ratio(52.31, 4.04) == "52.3× ± 4.0"
