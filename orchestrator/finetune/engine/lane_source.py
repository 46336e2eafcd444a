"""The interface between the fine-tuning loop and its scheduler.

The loop leases lanes from a `LaneSource`, reports to it at evaluations, and asks it for directives. On a
cluster the source is a client of the broker; in tests it is a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from orchestrator.record.schema import RecordState, StepMetrics
from orchestrator.study.configuration import Configuration


class Directive(StrEnum):
    """An instruction of the scheduler to a trainer about one of its lanes."""

    CONTINUE = "continue"
    """Continue to train the lane."""
    PARK = "park"
    """Keep the lane on the model and do not train it until a later CONTINUE."""
    STOP = "stop"
    """End the lane early: keep its checkpoint and write a `stopped` record."""
    YIELD = "yield"
    """Save the lane's checkpoint and return its lease, because another trainer takes the lane over, or this
    one has to end."""
    DROP = "drop"
    """Remove the lane and write nothing, because this trainer no longer holds its lease."""


@dataclass(frozen=True)
class Lease:
    """The right to train one configuration."""

    configuration: Configuration
    attempt: int
    """Number of this lease, from 1. Each attempt resumes from the newest undamaged checkpoint."""
    scheduler: str = ""
    """Settings of the scheduler that may stop the lane, for a `stopped` record."""


@dataclass(frozen=True)
class LeaseGrant:
    """What a lane source answers when a trainer requests lanes."""

    leases: tuple[Lease, ...] = ()
    """The leases for the trainer: at most as many as it has requested, and all of one group key."""
    closed: bool = False
    """If true, the trainer may end: no lane waits for it, and none will."""
    requires_empty_group: bool = False
    """If true, all lanes of the group, which must be long parked, leave before these lanes start."""


@dataclass(frozen=True)
class Report:
    """The result of a lane's evaluation on the validation split."""

    fingerprint: str
    attempt: int
    step: int
    """Optimizer steps that the lane has taken."""
    scores: Mapping[str, float]
    """Score name -> value, validation split."""
    curve: tuple[StepMetrics, ...] = ()
    """Some of the steps since the last report, this one included (see `select_live_steps`), for curves that
    are shown live."""


class LaneSource(Protocol):
    """A scheduler as the loop sees it.

    `steps_taken` is the number of optimizer steps that this trainer has taken, all lanes together. A step
    that is repeated after a resumption counts again, because its computation is paid again.
    """

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Lease lanes.

        Args:
            group_key: The group key of the lanes. None allows any one group key: the lane group is empty, or
                all of its lanes are long parked and leave for the new ones.
            capacity: The largest number of leases.
            steps_taken: Optimizer steps of this trainer.
        """

    def report(self, report: Report) -> Directive:
        """Deliver a report and return the directive for its lane."""

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """Send a heartbeat and return directives for lanes of this trainer, by fingerprint."""

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """Give back the lease of a lane that has not ended and that this trainer no longer trains.

        Any trainer may lease the lane again; a parked lane only after its trial has asked to continue.
        """

    def notify(self, line: str) -> None:
        """Show a line to the users who watch the study."""

    def note_max_lanes(self, max_lanes: int) -> None:
        """Note how many lanes of its group key the trainer can hold now, those that it holds included."""

    def note_progress(self) -> None:
        """Note that the loop has computed something since its last call, such as a batch of an evaluation.

        A loop that makes neither a call nor progress for long is hung. This method is called very often and
        returns at once.
        """

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """End the lease of a lane whose record is in the store."""


def evaluation_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """Return the steps after which a lane is evaluated: evenly spaced, the last one at the end.

    Args:
        steps: Optimizer steps of the lane.
        evaluations: The requested number of evaluations; it is limited to the range from 1 to `steps`.
    """
    count = max(1, min(evaluations, steps))
    return tuple(steps * i // count for i in range(1, count + 1))
