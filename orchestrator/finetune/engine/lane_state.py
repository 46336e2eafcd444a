"""The states of a lane on a trainer, as a state machine.

    leased -> training <-> evaluating -> reporting -> training | parked | ended

A lane can end in any state. A parked lane continues in the state that follows from its pending work.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class LaneState(StrEnum):
    """What a lane does next."""

    LEASED = "leased"
    """Is added to the model."""
    TRAINING = "training"
    """Takes an optimizer step."""
    EVALUATING = "evaluating"
    """Is scored, because its step is one of its evaluation steps."""
    REPORTING = "reporting"
    """Sends its pending reports to the source."""
    PARKED = "parked"
    """Waits for CONTINUE from the source."""
    ENDED = "ended"
    """Nothing: it has left the trainer."""


TRANSITIONS: Mapping[LaneState, frozenset[LaneState]] = {
    # A lane that resumes from a checkpoint may have reports to send or scores to compute first.
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
"""State -> states that may follow it."""


class IllegalTransitionError(RuntimeError):
    """A transition that `TRANSITIONS` does not allow; a bug in the loop."""


def evaluation_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """Return the steps after which a lane is evaluated: evenly spaced, the last one at the end.

    Args:
        steps: Optimizer steps of the lane.
        evaluations: The wanted number; at least one and at most one a step are made.
    """
    count = max(1, min(evaluations, steps))
    return tuple(steps * i // count for i in range(1, count + 1))
