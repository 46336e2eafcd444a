"""When early stopping looks at a lane, and the one spelling of its settings. Plain Python, without Tune.

All schedulers compare validation losses, the lower the better, and none looks before the first evaluation
that lies behind the warm-up: until then a high rate has not shown what it does.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.finetune.engine.lane_state import evaluation_steps
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import training_order
from orchestrator.study.lr_schedule import warmup_steps

REDUCTION_FACTOR = {
    "asha": 4,
    "hyperband": 3,
}  # one lane in so many goes on to the next rung; docs/early_stopping.md
LAST_RUNG_DIVISOR = 3  # ASHA's lies no later than at a third of the steps, or is the first
MIN_SAMPLES = 3  # lanes that have come as far, before the median of their losses stops anybody


def lane_evaluation_steps(configuration: Configuration) -> tuple[int, ...]:
    """After which optimizer steps the lane is evaluated."""
    return evaluation_steps(configuration.schedule.steps, configuration.evaluations)


def first_rung(configuration: Configuration) -> int:
    """The step of the first evaluation after the warm-up (the last one if all lie in it)."""
    steps = lane_evaluation_steps(configuration)
    return next((step for step in steps if step >= warmup_steps(configuration.schedule)), steps[-1])


def last_rung(configuration: Configuration) -> int:
    """ASHA's: a later one saves little and costs the choice its seeds."""
    return max(first_rung(configuration), configuration.schedule.steps // LAST_RUNG_DIVISOR)


def evaluation_index(configuration: Configuration, step: int) -> int:
    """How many evaluations from the first rung on lie at or before `step`: Hyperband's time. Its brackets are
    made of whole units from 1; in steps, most of them would end before the first evaluation."""
    return sum(first_rung(configuration) <= each <= step for each in lane_evaluation_steps(configuration))


def scheduler_settings(scheduler: str, configuration: Configuration) -> str:
    """What a stopped record keeps, to tell whether it answers a request. Empty without early stopping."""
    if scheduler == "none":
        return ""
    parts = [scheduler, "loss=min", f"first={first_rung(configuration)}"]
    parts += [f"samples={MIN_SAMPLES}" if scheduler == "median" else f"eta={REDUCTION_FACTOR[scheduler]}"]
    parts += [f"last={last_rung(configuration)}"] if scheduler == "asha" else []
    return " ".join(parts)


def submission_order(
    scheduler: str, cached: Sequence[Configuration], pending: Sequence[Configuration], lanes: int
) -> list[Configuration]:
    """What Tune is given, in this order. `known` results are replayed to it, since it keeps no rungs: before
    the others, so that all of them count from the first decision on. Hyperband fills its brackets in the
    order of entry: there each takes the place that it had when nothing was known, if the same grid was asked
    for. In an extended grid it may come into another bracket, where what was stopped before counts with the
    evaluations that it has and is not trained further."""
    if scheduler == "none":
        return list(pending)
    return training_order([*cached, *pending], lanes) if scheduler == "hyperband" else [*cached, *pending]
