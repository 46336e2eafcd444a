"""The kinds of ends of trainers, and the number of failures that ends the study."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from orchestrator.execution.broker.devices import DeviceRegistry

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
    STORE_FULL = "store_full"
    """The store's disk has stayed full for too long."""
    FAILED = "failed"
    """A worker raised another error, or Ray Train's controller died."""


class FailurePolicy:
    """Count trainer failures in a row and decide when the study must end.

    Two counts end a study: failures while no trainer took a step, unless a trainer on sound devices is there,
    and failures of trainers that took steps while no lane made progress. The second limit grows with the
    number of trainers. Failures on excluded devices do not count.
    """

    def __init__(self) -> None:
        self.devices = DeviceRegistry()
        self.max_live_trainers = 1
        """The largest number of trainers that were alive at once."""
        self._without_step: Counter[tuple[str, ...]] = Counter()
        """Failures since a trainer last took a step or a lane was found faulty, by the trainer's devices."""
        self._without_progress: Counter[tuple[str, ...]] = Counter()
        """Failures of trainers that had taken a step, since a lane last made progress, by the trainer's
        devices. Faulty lanes count as failures here: if every lane seems faulty, the cause is elsewhere."""
        self._max_steps_of_dead = 0
        """The most steps of a trainer that has ended since a lane last made progress."""

    @property
    def failures_without_step(self) -> int:
        """Failures since a trainer last took a step or a lane was found faulty."""
        return self._without_step.total()

    def on_step(self, trainer_name: str, steps: int) -> None:
        """Record that a trainer has taken `steps` optimizer steps so far.

        A trainer that gets further than all that have ended makes progress, even if its lanes report much
        later. A trainer that does not may only repeat the steps before the next failure.
        """
        self.devices.on_step(trainer_name)
        self._without_step.clear()
        if steps > self._max_steps_of_dead:
            self._without_progress.clear()

    def on_progress(self) -> None:
        """Record that a lane has a new report, a newer checkpoint or a final record."""
        self._without_step.clear()
        self._without_progress.clear()
        self._max_steps_of_dead = 0

    def on_faulty_lane(self) -> None:
        """Record that a lane was given up because it crashes every trainer."""
        self._without_step.clear()
        self._without_progress[()] += 1

    def on_exit(
        self, trainer_name: str, steps: int, is_failure: bool = False, is_lane_suspect: bool = True
    ) -> None:
        """Record that a trainer has ended.

        Args:
            trainer_name: The trainer's name.
            steps: The optimizer steps that it has taken.
            is_failure: True if the trainer failed, and the failure does not help to find a faulty lane.
                Failures that do help are not counted, because halving lane groups and retrying single lanes
                bound their number.
            is_lane_suspect: False if the trainer died and its lanes are probably not the cause. The death
                then counts against the devices.
        """
        self._max_steps_of_dead = max(self._max_steps_of_dead, steps)
        devices = self.devices.devices_of(trainer_name)
        self.devices.on_exit(trainer_name)
        if not self.devices.excluded.keys().isdisjoint(devices):
            return
        if is_failure:
            self._without_step[devices] += 1
            self._without_progress[devices] += steps > 0
        if not is_lane_suspect and self.devices.on_death(devices):
            for counter in (self._without_step, self._without_progress):
                for key in [key for key in counter if not self.devices.excluded.keys().isdisjoint(key)]:
                    del counter[key]

    @property
    def abort_reason(self) -> str:
        """The reason why no more trainers should be started; empty while they should."""
        failures = self._without_step.total()
        if failures > MAX_TRAINER_FAILURES and not self.devices.has_sound_trainer():
            return f"Trainers died {failures} times in a row without taking a step; see the messages above."
        failures = self._without_progress.total()
        if failures > MAX_TRAINER_FAILURES * (1 + self.max_live_trainers):
            return (
                f"Trainers died {failures} times in a row while no lane got any further; see the messages "
                "above."
            )
        return ""
