"""The rule that decides whether a lane has diverged. Its state is part of the lane's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.study.configuration import DivergenceConfig, LRSchedule, warmup_steps


class DivergenceDetector:
    """A detector that checks the training loss and the gradient norm of every step before it is taken.

    A lane has diverged when a value is not finite, or when after warm-up the smoothed loss m_t = s m_{t-1} +
    (1 - s) loss_t, with m_0 = loss_0 and s = `rule.smoothing`, has exceeded `rule.loss_ratio` times the
    untrained loss for `rule.share` of all steps in a row.

    Args:
        rule: The rule's parameters.
        schedule: The lane's schedule, which gives the numbers of steps and of warm-up steps.
        untrained_loss: Validation loss of the base model, in the unit of the training loss.
    """

    def __init__(self, rule: DivergenceConfig, schedule: LRSchedule, untrained_loss: float) -> None:
        self.smoothing = rule.smoothing
        self.loss_limit = rule.loss_ratio * untrained_loss
        self.warmup_steps = warmup_steps(schedule)
        self.patience = max(1, math.ceil(round(rule.share * schedule.steps, 9)))
        self.smoothed_loss: float | None = None
        self.steps_above_limit = 0
        """Steps in a row in which the smoothed loss was above the limit."""

    def observe(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """Return why the lane has diverged, or None.

        Args:
            step: The step to be taken, counted from 0.
            loss: Its training loss, in nats per target (squared error for a regression task).
            gradient_norm: L2 norm of its gradient.
        """
        if not math.isfinite(loss):
            return f"training loss {loss} in step {step + 1}"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm} in step {step + 1}"
        previous = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = self.smoothing * previous + (1.0 - self.smoothing) * loss
        is_above = step >= self.warmup_steps and self.smoothed_loss > self.loss_limit
        self.steps_above_limit = self.steps_above_limit + 1 if is_above else 0
        if self.steps_above_limit < self.patience:
            return None
        return (
            f"smoothed training loss {self.smoothed_loss:.3g} in step {step + 1}, "
            f"above {self.loss_limit:.3g} for {self.steps_above_limit} steps in a row"
        )

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the state as JSON values."""
        return {"smoothed": self.smoothed_loss, "above": self.steps_above_limit}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Restore the state from `state_dict`'s value."""
        self.smoothed_loss, self.steps_above_limit = state["smoothed"], int(state["above"] or 0)
