"""Numbers as people read them: decimal byte units, seconds to hours, a figure with its spread."""


def format_bytes(value: float | None) -> str:
    """`86.1 MB`; decimal units (1 kB = 1000 bytes), three significant digits, a dash for None."""
    if value is None:
        return "–"
    for limit, unit in ((1e3, "B"), (1e6, "kB"), (1e9, "MB"), (1e12, "GB")):
        # The next unit begins where three digits would round up to it.
        if value < 0.9995 * limit:
            return f"{_digits(value / (limit / 1e3))} {unit}"
    return f"{_digits(value / 1e12)} TB"


def tick_bytes(value: float) -> str:
    """`50 kB`: bytes without the zeros that `format_bytes` ends in."""
    number, unit = format_bytes(value).split()
    return f"{float(number):g} {unit}"


def format_seconds(value: float | None) -> str:
    """`4.2 s`, `3.5 min`, `2.1 h`; a dash for None."""
    if value is None:
        return "–"
    if value < 120:
        return f"{_digits(value)} s"
    return f"{_digits(value / 60)} min" if value < 7200 else f"{_digits(value / 3600)} h"


def format_figure(mean: float | None, spread: float | None, digits: int = 3) -> str:
    """`3.41 ± 0.02` with `digits` decimals; without spread the mean alone, a dash for None."""
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def format_ratio(mean: float | None, spread: float | None = None) -> str:
    """`52.3×`, `2.41× ± 0.10`; a dash for None."""
    if mean is None:
        return "–"
    decimals = 2 if mean < 10 else 1 if mean < 100 else 0
    return f"{mean:.{decimals}f}×" + (f" ± {spread:.{decimals}f}" if spread is not None else "")


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 9.996 has the digits of 10.0
    return f"{value:.{max(2 - exponent, 0)}f}"
