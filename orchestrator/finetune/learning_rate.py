"""The learning rate's course over a lane's steps."""

from __future__ import annotations

import math

from orchestrator.study.configuration import Schedule


def warmup_steps(schedule: Schedule) -> int:
    """Steps of warm-up: `warmup * steps`, rounded up. (0.07 * 100 is 7.000000000000001 in floating point and
    still 7 steps.)"""
    return min(schedule.steps, math.ceil(round(schedule.warmup * schedule.steps, 9)))


def factor(schedule: Schedule, step: int) -> float:
    """What the peak learning rate is multiplied by in step 0 .. steps-1.

    With w warm-up steps and n = steps - w after them: (step + 1) / w while step < w, so that no step is
    wasted at rate zero and the peak is reached; then, at p = (step - w) / n in [0, 1), one of
    constant: 1, linear: 1 - p, cosine: (1 + cos(pi p)) / 2, the last two on their way to 0 at the end.
    """
    if not 0 <= step < schedule.steps:
        raise ValueError(f"step {step} is outside a schedule of {schedule.steps} steps")
    warm = warmup_steps(schedule)
    if step < warm:
        return (step + 1) / warm
    past = (step - warm) / (schedule.steps - warm)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return 1.0 - past
    return 0.5 * (1.0 + math.cos(math.pi * past))
