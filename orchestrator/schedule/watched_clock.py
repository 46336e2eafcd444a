"""A clock for deadlines that end something because it was silent."""

from __future__ import annotations

import time

MOST_SECONDS = 15.0


class WatchedClock:
    """Monotonic seconds, as far as somebody looked at the clock.

    A machine that was suspended, a process that was stopped and a clock that jumps leave a gap between two
    looks. Such a gap says nothing of those who did not answer meanwhile: it counts as `most` seconds at most.

    Args:
        most: longer than the longest time between two looks where nothing is wrong, in seconds.
    """

    def __init__(self, most: float = MOST_SECONDS) -> None:
        self._most = most
        self._now = self._looked = time.monotonic()

    def __call__(self) -> float:
        """Return the seconds of this clock, whose zero means nothing."""
        looked = time.monotonic()
        self._now += min(max(0.0, looked - self._looked), self._most)
        self._looked = looked
        return self._now
