"""When a lane has diverged. A plain object whose state goes into the lane's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.study.configuration import DivergenceConfig, LRSchedule
from orchestrator.study.lr_schedule import warmup_steps


class DivergenceDetector:
    """Looks at every step's training loss and gradient norm before the step is taken.

    Diverged: a value that is not finite, at once; or, after warm-up, a smoothed loss
    m_t = s m_{t-1} + (1 - s) loss_t  (m_0 = loss_0, s = `smoothing`)  above `loss_ratio` times the untrained
    base's loss for `share` of all steps in a row. Losses in nats a token.
    """

    def __init__(self, rule: DivergenceConfig, schedule: LRSchedule, untrained_loss: float) -> None:
        self.smoothing = rule.smoothing
        self.loss_limit = rule.loss_ratio * untrained_loss
        self.warmup_steps = warmup_steps(schedule)
        self.patience = max(1, math.ceil(round(rule.share * schedule.steps, 9)))
        self.smoothed_loss: float | None = None
        self.steps_above_limit = 0
        """Steps in a row that the smoothed loss has been above the limit."""

    def observe(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """The reason why the lane has diverged in step `step` (counted from 0), or None."""
        if not math.isfinite(loss):
            return f"training loss {loss} in step {step + 1}"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm} in step {step + 1}"
        previous = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = self.smoothing * previous + (1.0 - self.smoothing) * loss
        self.steps_above_limit = (
            self.steps_above_limit + 1
            if step >= self.warmup_steps and self.smoothed_loss > self.loss_limit
            else 0
        )
        if self.steps_above_limit < self.patience:
            return None
        return (
            f"smoothed training loss {self.smoothed_loss:.3g} in step {step + 1}, above {self.loss_limit:.3g} for "
            f"{self.steps_above_limit} steps in a row"
        )

    def state_dict(self) -> dict[str, float | int | None]:
        return {"smoothed": self.smoothed_loss, "above": self.steps_above_limit}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        self.smoothed_loss, self.steps_above_limit = state["smoothed"], int(state["above"] or 0)
