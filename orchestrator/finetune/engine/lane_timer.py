"""The time of a trainer's process, divided among the lanes that it was used for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from orchestrator.finetune.engine.lane import Lane


def process_start() -> float:
    """Return the start of this process on the clock of `time.monotonic`."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


@dataclass
class LaneTimer:
    """A timer that divides all time since the start of the process, without gaps, among the lanes.

    Attributes:
        counted_until: The time up to which seconds have been divided, on the monotonic clock.
        has_started: True once a lane has been worked on.
    """

    counted_until: float = field(default_factory=process_start)
    has_started: bool = False

    def add(self, lanes: Sequence[Lane], kind: str) -> None:
        """Add the seconds since the last call, in equal shares, to the lanes.

        Args:
            lanes: The lanes that the time was used for. If there is none, the time is added at the next call.
            kind: A field of `Cost`, such as "train_seconds".
        """
        if not lanes:
            return
        now = time.monotonic()
        for lane in lanes:
            lane.seconds[kind] += (now - self.counted_until) / len(lanes)
        self.counted_until = now

    def begin_work(self, lanes: Sequence[Lane]) -> None:
        """Add the time that has passed since the last step or evaluation, before another one begins."""
        self.add(lanes, "other_seconds" if self.has_started else "start_seconds")
        self.has_started = self.has_started or bool(lanes)
