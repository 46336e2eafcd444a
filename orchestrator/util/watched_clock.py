"""A clock for timeouts after which a silent process is given up."""

from __future__ import annotations

import time

from orchestrator.util import timeouts


class SuspendTolerantClock:
    """A monotonic clock on which a gap between two readings counts as `most` seconds at most.

    Where the machine is suspended, this process is stopped or the clock jumps, there is a long gap between
    two readings. In that time others may have had no chance to answer, so it must not count as their silence.

    Args:
        most: seconds; longer than any gap between two readings where nothing is wrong.
    """

    def __init__(self, max_gap: float = timeouts.MAX_CLOCK_GAP_SECONDS) -> None:
        self._max_gap = max_gap
        self._now = self._last_reading = time.monotonic()

    def __call__(self) -> float:
        """Return the time in seconds, of which only differences have a meaning."""
        looked = time.monotonic()
        self._now += min(max(0.0, looked - self._last_reading), self._max_gap)
        self._last_reading = looked
        return self._now
