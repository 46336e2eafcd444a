"""Learning rate schedules: linear warm-up, then a constant, linear or cosine curve."""

from __future__ import annotations

import math

from orchestrator.study.configuration import LRSchedule


def warmup_steps(schedule: LRSchedule) -> int:
    """Return the number of warm-up steps: `warmup * steps`, rounded up.

    The product is first rounded to 9 decimals, so that 0.07 * 100 = 7.000000000000001 gives 7 steps. Without
    this rounding, transformers' Trainer has 8; otherwise both agree.
    """
    return min(schedule.steps, math.ceil(round(schedule.warmup * schedule.steps, 9)))


def lr_factor(schedule: LRSchedule, step: int) -> float:
    """Return the learning rate in a step as a fraction of the peak, as in transformers' schedules.

    Let w be the number of warm-up steps. While step < w the fraction is step / w; the first step has rate 0.
    Afterwards it is 1 (constant) or f + (1 - f) g, where f is `final_factor`, p = (step - w) / (steps - w) is
    in [0, 1), and g is 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).

    Args:
        schedule: Steps, warm-up and curve.
        step: Number of optimizer steps taken so far, from 0 to steps - 1.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: `step` is outside the schedule.
    """
    if not 0 <= step < schedule.steps:
        raise ValueError(f"step {step} is outside a schedule of {schedule.steps} steps")
    warm = warmup_steps(schedule)
    if step < warm:
        return step / warm
    progress = (step - warm) / (schedule.steps - warm)
    if schedule.name == "constant":
        return 1.0
    decay = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_factor + (1.0 - schedule.final_factor) * decay
