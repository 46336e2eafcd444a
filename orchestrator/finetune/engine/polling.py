"""How often a seat asks its source. All seats ask one broker: where its answers take long, they ask less."""

from __future__ import annotations

from dataclasses import dataclass

LATENCY_FACTOR = (
    20.0  # times as long as the last answer took, so that little of a seat's time goes into waiting
)
MAX_SLOWDOWN = 20.0  # times as long as usual: a stop, a drain or Ctrl-C has to be heard


@dataclass
class PollInterval:
    """At most every `seconds`, and less often while answers are slow. Times are a clock's, in seconds."""

    min_seconds: float
    last_latency: float = 0.0
    """The last answer."""

    def record_answer(self, sent_at: float, now: float) -> None:
        self.last_latency = now - sent_at

    def is_due(self, last_answered_at: float, now: float) -> bool:
        """Whether to ask again; `last`: when it was answered before."""
        backoff = min(LATENCY_FACTOR * self.last_latency, MAX_SLOWDOWN * self.min_seconds)
        return now - last_answered_at >= max(self.min_seconds, backoff)
