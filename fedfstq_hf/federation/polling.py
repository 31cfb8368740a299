"""Looking at a mailbox again and again: often at first, less often while nothing happens."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

_GROWTH = 1.3
_LONGEST = 8.0  # times the first pause


class Polling:
    """The pauses between two looks.

    Args:
        seconds: mean length of the first pause; each is 1.3 times as long as the one before, up to 8 times the first.
        jitter: a pause is up to that share longer or shorter, so that many processes do not stay in step.
        sleep: a test passes its own.
    """

    def __init__(self, seconds: float, *, jitter: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._seconds = self._wait = seconds
        self._jitter = jitter
        self._sleep = sleep

    def pause(self, at_most: float = math.inf) -> None:
        """Sleep; before jitter no longer than `at_most` seconds."""
        self._sleep(min(self._wait, at_most) * random.uniform(1 - self._jitter, 1 + self._jitter))
        self._wait = min(self._wait * _GROWTH, self._seconds * _LONGEST)

    def reset(self) -> None:
        """Something happened: the next pause is as short as the first."""
        self._wait = self._seconds
