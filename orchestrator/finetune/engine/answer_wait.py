"""The decision whether lanes at their last step wait for others, to have their answers generated together.

Generating the answers of a few lanes takes about as long as generating those of one lane, if there is memory
for all of them. No lane trains while answers are generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from orchestrator.finetune.engine.lane import Lane

SMOOTHING = 0.8
"""The weight of earlier rounds in the moving average of the duration of a round of steps."""


@dataclass
class AnswerWait:
    """A rule by which rank 0 decides whether lanes wait, from measured durations in seconds."""

    step_seconds: float | None = None
    """The moving average of the duration of a round of optimizer steps; None before the first."""
    generate_seconds: float | None = None
    """The duration of the last generation of answers, of all lanes together; None before the first."""

    @contextmanager
    def measure_steps(self) -> Iterator[None]:
        """Measure one round of optimizer steps."""
        started = monotonic()
        yield
        seconds = monotonic() - started
        earlier = seconds if self.step_seconds is None else self.step_seconds
        self.step_seconds = SMOOTHING * earlier + (1 - SMOOTHING) * seconds

    def record_generation(self, lanes: Sequence[Lane], seconds_before: float) -> None:
        """Store how long the generation of answers took in an evaluation of these lanes.

        Args:
            lanes: The lanes that were evaluated together.
            seconds_before: The sum of their `generate_seconds` before the evaluation.
        """
        if seconds := sum_generate_seconds(lanes) - seconds_before:
            self.generate_seconds = seconds

    def is_worthwhile(self, training: Sequence[Lane]) -> bool:
        """Return whether lanes at their last step should wait for the next lane to reach its last step.

        They wait if the remaining steps of that lane take less time than the last generation of answers.
        Before the first measurement they do not wait.

        Args:
            training: The lanes that still take steps.
        """
        if not training or self.step_seconds is None or self.generate_seconds is None:
            return False
        steps_left = min(lane.configuration.lr_schedule.steps - lane.step for lane in training)
        return steps_left * self.step_seconds < self.generate_seconds


def sum_generate_seconds(lanes: Sequence[Lane]) -> float:
    """Return the seconds in which answers of these lanes have been generated and graded."""
    return sum(lane.seconds["generate_seconds"] for lane in lanes)
