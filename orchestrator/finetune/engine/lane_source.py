"""The seam between the fine-tuning loop and whoever schedules it. Plain Python on both sides.

The loop is handed a `Source`: it leases lanes, reports at evaluations, and asks now and then what has
changed. Behind it stands the broker on a cluster, or a list in a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from orchestrator.record.schema import RecordState
from orchestrator.study.configuration import Configuration


class Directive(StrEnum):
    CONTINUE = "go"
    """Train on."""
    PARK = "park"
    """Keep the lane where it is, train it no further until a later GO."""
    STOP = "stop"
    """End it early: keep its checkpoint, write a `stopped` record."""
    YIELD = "leave"
    """Save its checkpoint and give the lease back, by `spill`: this seat has to go, another trains it on."""
    DROP = "drop"
    """The lane is no longer this seat's: forget it, write nothing."""


@dataclass(frozen=True)
class Lease:
    """The right to train one configuration, once. A new attempt starts from the newest whole checkpoint."""

    configuration: Configuration
    attempt: int
    scheduler: str = ""
    """Settings of the scheduler that may stop it, for the `stopped` record."""


@dataclass(frozen=True)
class LeaseGrant:
    """What a seat is given: at most as many leases as it has room for, all of one shape."""

    leases: tuple[Lease, ...] = ()
    closed: bool = False
    """Nothing waits and nothing more will come, or not to this seat: it may end."""
    requires_empty_group: bool = False
    """They may not share a pack with the lanes that are there, all parked for long: those leave first."""


@dataclass(frozen=True)
class Report:
    """A lane's news at an evaluation. `step` counts optimizer steps; `scores` are the validation split's."""

    fingerprint: str
    attempt: int
    step: int
    scores: Mapping[str, float]
    train_loss: float


class LaneSource(Protocol):
    """`taken`: the optimizer steps that this seat has taken since it began, all lanes together. A step that
    is repeated after a resumption counts again, because it cost again."""

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Up to `room` lanes of `shape`. Of any one shape when `shape` is None: the pack is empty, or all of
        it has been parked for long and will be spilled for what is given."""
        ...

    def report(self, report: Report) -> Directive: ...

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """A sign of life; returns what to do with the lanes that are held (fingerprint -> answer)."""
        ...

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """A lane was saved to its checkpoint, if it could be, and has left the pack; it waits for any seat, a
        parked one first for its trial to ask on."""
        ...

    def notify(self, line: str) -> None:
        """Show `line` to the people who watch the study."""
        ...

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """The lane has ended and its record, if any, is in the store already."""
        ...
