"""When a lane has diverged. A plain object whose state goes into the lane's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.study.configuration import Divergence, Schedule
from orchestrator.study.lr_schedule import warmup_steps


class Watch:
    """Looks at every step's training loss and gradient norm before the step is taken.

    Diverged: a value that is not finite, at once; or, after warm-up, a smoothed loss
    m_t = s m_{t-1} + (1 - s) loss_t  (m_0 = loss_0, s = `smoothing`)  above `loss_ratio` times the untrained
    base's loss for `share` of all steps in a row. Losses in nats a token.
    """

    def __init__(self, rule: Divergence, schedule: Schedule, untrained_loss: float) -> None:
        self.smoothing = rule.smoothing
        self.limit = rule.loss_ratio * untrained_loss
        self.warmup = warmup_steps(schedule)
        self.patience = max(1, math.ceil(round(rule.share * schedule.steps, 9)))
        self.smoothed: float | None = None
        self.above = 0
        """Steps in a row that the smoothed loss has been above the limit."""

    def observe(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """The reason why the lane has diverged in step `step` (counted from 0), or None."""
        if not math.isfinite(loss):
            return f"training loss {loss} in step {step + 1}"
        if not math.isfinite(gradient_norm):
            return f"gradient norm {gradient_norm} in step {step + 1}"
        past = loss if self.smoothed is None else self.smoothed
        self.smoothed = self.smoothing * past + (1.0 - self.smoothing) * loss
        self.above = self.above + 1 if step >= self.warmup and self.smoothed > self.limit else 0
        if self.above < self.patience:
            return None
        return (
            f"smoothed training loss {self.smoothed:.3g} in step {step + 1}, above {self.limit:.3g} for "
            f"{self.above} steps in a row"
        )

    def state(self) -> dict[str, float | int | None]:
        return {"smoothed": self.smoothed, "above": self.above}

    def restore(self, state: Mapping[str, float | int | None]) -> None:
        self.smoothed, self.above = state["smoothed"], int(state["above"] or 0)
