"""Learning rate schedules."""

from __future__ import annotations

import math

from orchestrator.study.configuration import LRSchedule


def warmup_steps(schedule: LRSchedule) -> int:
    """Return the number of warm-up steps: `warmup * steps`, rounded up.

    This is the number in transformers' Trainer except for rounding errors: 0.07 * 100 is 7.000000000000001 in
    floating point, which gives 7 steps here and 8 there.
    """
    return min(schedule.steps, math.ceil(round(schedule.warmup * schedule.steps, 9)))


def lr_factor(schedule: LRSchedule, step: int) -> float:
    """Return the factor of the peak learning rate in a step, as in transformers' schedules.

    With w warm-up steps and n = steps - w steps after them, the factor is step / w while step < w (the first
    step has rate 0). After that it is 1 (constant) or f + (1 - f) g, where f is `final_factor`, p is
    (step - w) / n in [0, 1), and g is 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).

    Args:
        schedule: Steps, warm-up and curve.
        step: Optimizer steps taken so far, 0 to steps - 1.

    Returns:
        A factor in [0, 1].

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
