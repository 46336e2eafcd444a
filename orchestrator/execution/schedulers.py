"""Early stopping: the schedulers of Ray Tune that a study may use, reusable results, and the order of trials.

All schedulers compare validation losses; lower is better. No lane is compared before its first evaluation
after the warm-up, because a high learning rate shows its effect only then. To add a scheduler, add an entry
to SCHEDULERS. Ray is imported when a scheduler is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.engine.lane_source import evaluation_steps
from orchestrator.study.configuration import Configuration, warmup_steps
from orchestrator.study.grids import training_order

if TYPE_CHECKING:
    from orchestrator.record.schema import Record
    from orchestrator.record.store import Store

REDUCTION_FACTOR = 4
"""One lane in this many continues to the next rung of ASHA; see docs/search.md."""
LAST_RUNG_DIVISOR = 3
"""ASHA has no rung after a lane's number of steps divided by this number, except the first one."""
MIN_SAMPLES = 3
"""Number of lanes that must have reached a step before median stopping compares other lanes with them."""
COMPARED: dict[str, Any] = {"time_attr": "step", "metric": "loss", "mode": "min"}
"""The arguments that every scheduler of Tune gets: what it compares, and when."""


@dataclass(frozen=True)
class EarlyStopping:
    """A rule that stops lanes early."""

    settings: Callable[[Configuration], str]
    """Returns the settings in words. A stopped record keeps them; a study with equal settings reuses it."""
    make: Callable[[Configuration], Any]
    """Returns Tune's scheduler for the lanes that are compared with each other. Steps and evaluations are
    those of the configuration. The scheduler may stop trials, but not pause them."""


def first_rung(configuration: Configuration) -> int:
    """Return the step of the first evaluation after the warm-up, else of the last evaluation."""
    steps = lane_evaluation_steps(configuration)
    return next((step for step in steps if step >= warmup_steps(configuration.lr_schedule)), steps[-1])


def last_rung(configuration: Configuration) -> int:
    """Return the step after which ASHA has no rung, Tune's `max_t`.

    A later rung would save few steps, and would stop some seeds of the variant's best settings.
    """
    return max(first_rung(configuration), configuration.lr_schedule.steps // LAST_RUNG_DIVISOR)


def lane_evaluation_steps(configuration: Configuration) -> tuple[int, ...]:
    """Return the optimizer steps after which the lane is evaluated."""
    return evaluation_steps(configuration.lr_schedule.steps, configuration.evaluations)


def _make_asha(configuration: Configuration) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler

    first, last = first_rung(configuration), last_rung(configuration)
    # A lane that has passed the last rung trains to its end.
    return AsyncHyperBandScheduler(
        grace_period=first, max_t=last, reduction_factor=REDUCTION_FACTOR, stop_last_trials=False, **COMPARED
    )


def _make_median(configuration: Configuration) -> Any:
    from ray.tune.schedulers import MedianStoppingRule

    never: Any = math.inf  # pausing a trial for others would cost a process and free no lane
    return MedianStoppingRule(
        grace_period=first_rung(configuration),
        min_samples_required=MIN_SAMPLES,
        min_time_slice=never,
        **COMPARED,
    )


SCHEDULERS: dict[str, EarlyStopping | None] = {
    "none": None,
    "asha": EarlyStopping(
        lambda c: f"asha loss=min first={first_rung(c)} eta={REDUCTION_FACTOR} last={last_rung(c)}",
        _make_asha,
    ),
    "median": EarlyStopping(
        lambda c: f"median loss=min first={first_rung(c)} samples={MIN_SAMPLES}", _make_median
    ),
}
"""The values of --scheduler."""


def scheduler_settings(scheduler: str, configuration: Configuration) -> str:
    """Return the settings that a stopped record stores; empty without early stopping."""
    rule = SCHEDULERS[scheduler]
    return rule.settings(configuration) if rule else ""


def find_settled(store: Store, fingerprint: str, scheduler: str) -> Record | None:
    """Return the record of a configuration that is not trained any further; None if it is to be trained.

    It is the result under this early stopping, if there is one: a final record, or a stopped one with the
    same settings. Else it is the failed record of a configuration that has failed too often.

    Args:
        store: The records.
        fingerprint: The configuration.
        scheduler: The study's early stopping, or "none".
    """
    from orchestrator.record.schema import FINAL_STATES, MAX_FAILURES  # the command line reads SCHEDULERS

    record = store.get(fingerprint)
    if record is None or record.state in FINAL_STATES:
        return record
    reusable = store.get_reusable(fingerprint, scheduler_settings(scheduler, record.configuration))
    return reusable or (record if store.count_failures(fingerprint) >= MAX_FAILURES else None)


def submission_order(
    scheduler: str,
    cached: Sequence[Configuration],
    pending: Sequence[Configuration],
    lanes: int,
    num_trainers: int = 1,
) -> list[Configuration]:
    """Return the configurations of Tune's trials, in the order in which their lanes are submitted.

    The lanes of the first lane groups, one group for each trainer, are interleaved. The first trials then
    submit one lane of each group, so that each trainer begins with a group of its own.

    Tune keeps no rungs between runs, so known results are replayed. They are submitted first, so that the
    first decision takes them into account.

    Args:
        scheduler: The study's early stopping, or "none".
        cached: Configurations with known results.
        pending: Configurations to train.
        lanes: Lanes per trainer.
        num_trainers: Number of trainers.
    """
    ordered = training_order(pending, lanes)
    first = ordered[: num_trainers * lanes]
    dealt = [c for place in range(lanes) for c in first[place::lanes]]
    return [*(cached if scheduler != "none" else ()), *dealt, *ordered[len(first) :]]
