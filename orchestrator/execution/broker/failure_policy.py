"""The kinds of ends of trainers, and the number of failures that ends the study."""

from __future__ import annotations

from enum import StrEnum

MAX_TRAINER_FAILURES = 3
"""Number of failures in a row, without a step in between, that a study survives."""


class ExitKind(StrEnum):
    """The reason for which a trainer ended."""

    DONE = "done"
    """The trainer ended by itself, because no lane was left or because it was drained."""
    PLACEMENT_TIMEOUT = "placement_timeout"
    """Ray found no place for the trainer's workers in time."""
    NODE_LOST = "node_lost"
    """A node with a worker was lost or drained."""
    CRASHED = "crashed"
    """A worker process died, or lost its device, on a node that lives."""
    OUT_OF_MEMORY = "out_of_memory"
    """Ray killed a worker because the node was short of memory. No lane is proved faulty, since other
    processes may have used the memory, but a smaller lane group may fit."""
    REPEATED_LANE_FAILURES = "repeated_lane_failures"
    """A worker gave up after several lanes in a row had failed with the same message. The cause is a property
    that these lanes share, or the machine. The trainer's other lanes were not tried."""
    FAILED = "failed"
    """A worker raised another error, or Ray Train's controller died."""


class FailurePolicy:
    """Count trainer failures in a row and decide when the study must end.

    Two counts end a study: failures while no trainer took a step, and failures while no lane made progress.
    The second limit grows with the number of trainers.
    """

    def __init__(self) -> None:
        self.failures_without_step = 0
        """Failures since a trainer last took a step or a lane was found faulty."""
        self.failures_without_progress = 0
        """Failures since a lane last made progress. Faulty lanes count as failures here: if every lane seems
        faulty, the cause is elsewhere."""
        self.max_live_trainers = 1
        """The largest number of trainers that were alive at once."""

    def on_step(self) -> None:
        """Record that a trainer has taken an optimizer step."""
        self.failures_without_step = 0

    def on_progress(self) -> None:
        """Record that a lane has a new report, a newer checkpoint or a final record."""
        self.failures_without_step = self.failures_without_progress = 0

    def on_faulty_lane(self) -> None:
        """Record that a lane was given up because it crashes every trainer."""
        self.failures_without_step = 0
        self.failures_without_progress += 1

    def on_trainer_failure(self) -> None:
        """Record a failure that does not help to find a faulty lane.

        Failures that do help are not counted, because halving lane groups and retrying single lanes bound
        their number.
        """
        self.failures_without_step += 1
        self.failures_without_progress += 1

    @property
    def abort_reason(self) -> str:
        """The reason why no more trainers should be started; empty while they should."""
        if self.failures_without_step > MAX_TRAINER_FAILURES:
            return (
                f"Trainers died {self.failures_without_step} times in a row without taking a step; see the "
                "messages above."
            )
        if self.failures_without_progress > MAX_TRAINER_FAILURES * (1 + self.max_live_trainers):
            return (
                f"Trainers died {self.failures_without_progress} times in a row while no lane got any "
                "further; see the messages above."
            )
        return ""
