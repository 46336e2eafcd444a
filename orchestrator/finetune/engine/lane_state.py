"""The life of a lane on a seat, as a plain state machine.

    leased -> training <-> evaluating -> reporting -> training | parked | ended

Any of them may end; a parked lane goes on where it was held.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class LaneState(StrEnum):
    LEASED = "leased"
    """Ours, not yet on the model."""
    TRAINING = "training"
    EVALUATING = "evaluating"
    """At a step where scores are due."""
    REPORTING = "reporting"
    """Has scores that the source has not been told."""
    PARKED = "parked"
    """Waits for the source's go-ahead."""
    ENDED = "ended"


TRANSITIONS: Mapping[LaneState, frozenset[LaneState]] = {
    # A lane that resumes may owe reports or scores.
    LaneState.LEASED: frozenset(
        {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED}
    ),
    LaneState.TRAINING: frozenset({LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED}),
    LaneState.EVALUATING: frozenset({LaneState.REPORTING, LaneState.PARKED, LaneState.ENDED}),
    LaneState.REPORTING: frozenset(
        {LaneState.TRAINING, LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED}
    ),
    LaneState.PARKED: frozenset(
        {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED}
    ),
    LaneState.ENDED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """A lane was sent where it cannot go from where it is: a fault of the loop."""


def evaluation_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """After which steps a lane is evaluated: evenly spaced, the last at the end."""
    count = max(1, min(evaluations, steps))
    return tuple(steps * i // count for i in range(1, count + 1))
