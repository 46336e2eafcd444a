"""A clock for time-outs after which a silent process counts as lost."""

from __future__ import annotations

import time

from orchestrator.util import timeouts


class SuspendTolerantClock:
    """A monotonic clock that counts at most `max_gap` seconds between two readings.

    A long gap means that the machine was suspended, that this process was stopped or that the clock jumped.
    Other processes may have had no chance to answer in that time, so it must not count as their silence.

    Args:
        max_gap: Seconds; longer than any gap between two readings in normal operation.
    """

    def __init__(self, max_gap: float = timeouts.MAX_CLOCK_GAP_SECONDS) -> None:
        self._max_gap = max_gap
        self._now = self._last_reading = time.monotonic()

    def __call__(self) -> float:
        """Return the time in seconds; only differences between readings are meaningful."""
        reading = time.monotonic()
        self._now += min(max(0.0, reading - self._last_reading), self._max_gap)
        self._last_reading = reading
        return self._now
