"""Uplink budgets as people write them: bytes, bits per parameter, or time on a link. Decimal units throughout."""

from __future__ import annotations

import re
from decimal import Decimal

from ..errors import BudgetError

_NUMBER = r"(\d{1,15}(?:\.\d{1,9})?)"
_BYTES = re.compile(rf"{_NUMBER}\s*(B|kB|KB|MB|GB)?")
_PER_PARAM = re.compile(rf"{_NUMBER}\s*bpp")
_LINK = re.compile(rf"{_NUMBER}\s*(ms|s|min)\s*@\s*{_NUMBER}\s*(bps|kbps|Mbps|Gbps)")
_BYTE_UNITS = {None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TIME_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60)}
_RATE_UNITS = {"bps": 1, "kbps": 10**3, "Mbps": 10**6, "Gbps": 10**9}
_FORMS = 'write bytes ("96kB" or 96000), bits per parameter ("0.3bpp") or time on a link ("5s@2Mbps")'


def parse_budget(budget: str | int, num_params: int) -> int:
    """Whole bytes (rounded down) of one message for an adapter of `num_params` coordinates.

    "96kB" -> 96000; "0.3bpp" -> 0.3 * num_params / 8; "5s@2Mbps" -> 5 * 2e6 / 8. Raises BudgetError if it cannot be
    read or comes to less than one byte.
    """
    if isinstance(budget, bool) or not isinstance(budget, (str, int)):
        raise BudgetError(f"uplink budget {budget!r} is a {type(budget).__name__}; {_FORMS}")
    size = budget if isinstance(budget, int) else _parse(budget.strip(), num_params)
    if size < 1:
        raise BudgetError(f"uplink budget {budget!r} comes to {size} bytes for {num_params} parameters; {_FORMS}")
    return size


def check_empty_fits(size: int, max_bytes: int) -> None:
    """Raise BudgetError if an empty update, of `size` payload bytes, exceeds the budget: then nothing fits."""
    if size > max_bytes:
        raise BudgetError(
            f"an empty update takes {size} bytes of payload, the budget leaves {max_bytes} after the container; raise "
            f"the uplink budget by at least {size - max_bytes} bytes"
        )


def _parse(text: str, num_params: int) -> int:
    if match := _BYTES.fullmatch(text):
        return int(Decimal(match[1]) * _BYTE_UNITS[match[2]])
    if match := _PER_PARAM.fullmatch(text):
        return int(Decimal(match[1]) * num_params / 8)
    if match := _LINK.fullmatch(text):
        seconds, rate = Decimal(match[1]) * _TIME_UNITS[match[2]], Decimal(match[3]) * _RATE_UNITS[match[4]]
        return int(seconds * rate / 8)
    raise BudgetError(f"uplink budget {text!r} cannot be read; {_FORMS}")
