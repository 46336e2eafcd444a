"""How often a seat asks its source. All seats ask one broker: where its answers take long, they ask less."""

from __future__ import annotations

from dataclasses import dataclass

BETWEEN = 20.0  # times as long as the last answer took, so that little of a seat's time goes into waiting
AT_MOST = 20.0  # times as long as usual: a stop, a drain or Ctrl-C has to be heard


@dataclass
class Pace:
    """At most every `seconds`, and less often while answers are slow. Times are a clock's, in seconds."""

    seconds: float
    took: float = 0.0
    """The last answer."""

    def answered(self, asked: float, now: float) -> None:
        self.took = now - asked

    def due(self, last: float, now: float) -> bool:
        """Whether to ask again; `last`: when it was answered before."""
        slow = min(BETWEEN * self.took, AT_MOST * self.seconds)
        return now - last >= max(self.seconds, slow)
