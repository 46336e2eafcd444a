"""The interval at which a trainer asks its source.

All trainers ask one broker; while it answers slowly, they ask less often.
"""

from __future__ import annotations

from dataclasses import dataclass

LATENCY_FACTOR = 20.0
"""The interval is at least this many times the last answer's latency, so that a trainer waits little."""
MAX_SLOWDOWN = 20.0
"""The interval is at most this many times the shortest one, so that a trainer still notices a stop soon."""


@dataclass
class PollInterval:
    """The interval between two requests, which grows with the latency of the answers; times in seconds."""

    min_seconds: float
    """The shortest interval."""
    last_latency: float = 0.0
    """The latency of the last answer."""

    def record_answer(self, sent_at: float, now: float) -> None:
        """Note that a request sent at `sent_at` was answered at `now`."""
        self.last_latency = now - sent_at

    def is_due(self, last_answered_at: float, now: float) -> bool:
        """Return whether a new request is due."""
        backoff = min(LATENCY_FACTOR * self.last_latency, MAX_SLOWDOWN * self.min_seconds)
        return now - last_answered_at >= max(self.min_seconds, backoff)
