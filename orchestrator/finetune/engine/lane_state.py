"""The life of a lane on a seat, as a plain state machine.

    leased -> training <-> evaluating -> reporting -> training | parked | ended

Any of them may end; a parked lane goes on where it was held.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Phase(StrEnum):
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


NEXT: Mapping[Phase, frozenset[Phase]] = {
    # A lane that resumes may owe reports or scores.
    Phase.LEASED: frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.REPORTING, Phase.ENDED}),
    Phase.TRAINING: frozenset({Phase.EVALUATING, Phase.PARKED, Phase.ENDED}),
    Phase.EVALUATING: frozenset({Phase.REPORTING, Phase.PARKED, Phase.ENDED}),
    Phase.REPORTING: frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.PARKED, Phase.ENDED}),
    Phase.PARKED: frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.REPORTING, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class IllegalMove(RuntimeError):
    """A lane was sent where it cannot go from where it is: a fault of the loop."""


def due_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """After which steps a lane is evaluated: evenly spaced, the last at the end."""
    count = max(1, min(evaluations, steps))
    return tuple(steps * i // count for i in range(1, count + 1))
