"""The interval between two checkpoints of a lane, from the duration of a write and the rate of failures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from orchestrator.finetune.engine.lane import Lane
from orchestrator.util import timeouts

MEAN_SECONDS_BETWEEN_FAILURES = 24 * 3600.0
"""Assumed mean time between two failures of a trainer that lose the steps since the last checkpoints. The
drain of a node, as after a spot notice, is no such failure: the trainer saves its lanes first. A wrong
assumption costs little: with four times as many failures, the best interval is half as long."""


@dataclass
class CheckpointSchedule:
    """The schedule of lanes' checkpoints by Young's formula (Young 1974, CACM 17); times in seconds.

    If all lanes of a trainer are saved every T seconds, which takes C seconds, and a failure comes every M
    seconds, then C / T of the time goes into writing, and T / (2 M) is lost by failures. The sum is least at
    T = sqrt(2 C M).
    """

    write_seconds: float = 0.0
    """Duration of the last write of one lane; 0 before the first one and after one that failed, so that the
    next attempt follows after the shortest interval."""

    def compute_interval(self, lane_count: int) -> float:
        """Return the interval between two checkpoints of a lane.

        Args:
            lane_count: The lanes of the trainer.
        """
        optimum = math.sqrt(2 * self.write_seconds * lane_count * MEAN_SECONDS_BETWEEN_FAILURES)
        return min(max(optimum, timeouts.MIN_CHECKPOINT_SECONDS), timeouts.MAX_CHECKPOINT_SECONDS)

    def is_due(self, lane: Lane, lane_count: int, is_first: bool) -> bool:
        """Return whether the interval has passed since the lane's start or last checkpoint.

        Args:
            lane: The lane.
            lane_count: The lanes of the trainer.
            is_first: Whether the lane has not been saved since this trainer leased it. It is then saved after
                the shortest interval, so that a study whose trainers die every few minutes makes progress.
        """
        interval = timeouts.MIN_CHECKPOINT_SECONDS if is_first else self.compute_interval(lane_count)
        return time.monotonic() - lane.saved_at >= interval
