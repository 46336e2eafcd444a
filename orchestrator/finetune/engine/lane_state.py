"""The states of a lane on a trainer, as a state machine.

    leased -> training -> evaluating -> reporting -> training | parked | ended

A lane can end from any state. A lane that resumes from a checkpoint, and a parked lane that continues, enter
the state that their pending work requires (`Lane.enter_next_state`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum


class LaneState(StrEnum):
    """The next action of a lane on its trainer."""

    LEASED = "leased"
    """The lane is added to the model."""
    TRAINING = "training"
    """The lane takes an optimizer step."""
    EVALUATING = "evaluating"
    """The lane is scored, because its step is one of its evaluation steps."""
    REPORTING = "reporting"
    """The lane sends its pending reports to the source."""
    PARKED = "parked"
    """The lane waits for CONTINUE from the source."""
    ENDED = "ended"
    """The lane has left the trainer."""


TRANSITIONS: Mapping[LaneState, Collection[LaneState]] = {
    # A lane that resumes from a checkpoint may have reports to send or scores to compute first.
    LaneState.LEASED: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED},
    LaneState.TRAINING: {LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED},
    LaneState.EVALUATING: {LaneState.REPORTING, LaneState.PARKED, LaneState.ENDED},
    LaneState.REPORTING: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.PARKED, LaneState.ENDED},
    LaneState.PARKED: {LaneState.TRAINING, LaneState.EVALUATING, LaneState.REPORTING, LaneState.ENDED},
    LaneState.ENDED: (),
}
"""State -> states that may follow it."""


class IllegalTransitionError(RuntimeError):
    """A transition that `TRANSITIONS` does not allow; a bug in the loop."""


def evaluation_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """Return the steps after which a lane is evaluated: evenly spaced, the last one at the end.

    Args:
        steps: Optimizer steps of the lane.
        evaluations: The requested number of evaluations; it is limited to the range from 1 to `steps`.
    """
    count = max(1, min(evaluations, steps))
    return tuple(steps * i // count for i in range(1, count + 1))
