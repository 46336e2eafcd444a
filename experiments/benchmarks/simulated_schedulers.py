"""Early stopping applied to stored curves in this process, without a Ray cluster.

The study's own wrapper of Tune's schedulers receives one result after another; the lanes take turns, one
evaluation each. A replay takes a second. Hyperband pauses trials, which this simulation cannot do: for
hyperband, use replay_schedulers.py without `--without-ray`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from simulated_curves import replayed_curve

from orchestrator.execution.rungs import lane_evaluation_steps
from orchestrator.execution.tune.per_group_scheduler import PerGroupScheduler
from orchestrator.execution.tune.trial import WORST_LOSS
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration


class _Trial:
    """The attributes of a Tune trial that schedulers read."""

    status = "RUNNING"

    def __init__(self, configuration: Configuration) -> None:
        self.trial_id = configuration.fingerprint
        self.config = {"configuration": configuration.to_json()}


def reported_losses(
    configuration: Configuration, record: Record, loss_window: int
) -> list[tuple[int, float]]:
    """Return the results that the trial of a configuration would report to Tune.

    Args:
        configuration: The simulated configuration.
        record: The stored record of the same training, with the same or another number of evaluations.
        loss_window: See `SimulationPlan.loss_window`.

    Returns:
        (step, validation loss) of each evaluation; a diverged lane ends with the worst possible loss.
    """
    curve, steps = replayed_curve(record, configuration, loss_window), lane_evaluation_steps(configuration)
    reports = [(step, curve.scores[step, "validation"]["loss"]) for step in steps if step <= record.steps]
    if record.state == "diverged":
        last = reports[-1][0] if reports else 0
        reports.append((next((step for step in steps if step > last), last), WORST_LOSS))
    return reports


def simulate_scheduler(
    scheduler: str,
    configurations: Sequence[Configuration],
    records: Mapping[str, Record],
    max_concurrent_trials: int,
    loss_window: int = 0,
) -> list[Record]:
    """Return the records that a study under `scheduler` would leave.

    Args:
        scheduler: asha or median.
        configurations: The configurations in the order in which their trials start.
        records: Fingerprint -> record of the complete training.
        max_concurrent_trials: Number of trials that run at the same time.
        loss_window: See `SimulationPlan.loss_window`.
    """
    tune_scheduler: Any = PerGroupScheduler(scheduler)
    pending, ended_records = deque(configurations), list[Record]()
    running: list[tuple[_Trial, Record, deque[tuple[int, float]]]] = []
    while pending or running:
        while pending and len(running) < max_concurrent_trials:
            configuration = pending.popleft()
            trial, record = _Trial(configuration), records[configuration.fingerprint]
            tune_scheduler.on_trial_add(None, trial)
            full_record = replace(record, configuration=configuration, fingerprint=configuration.fingerprint)
            running.append((trial, full_record, deque(reported_losses(configuration, record, loss_window))))
        for each in list(running):
            trial, record, reports = each
            step, loss = reports.popleft()
            result = {"step": step, "loss": loss}
            stopped = tune_scheduler.on_trial_result(None, trial, result) == "STOP"
            if not reports:
                tune_scheduler.on_trial_complete(None, trial, result)
                ended_records.append(record)
            elif stopped:
                evaluations = tuple(e for e in record.evaluations if e.step <= step)
                ended_records.append(
                    replace(record, state="stopped", steps=step, stopped_at=step, evaluations=evaluations)
                )
            if stopped or not reports:
                running.remove(each)
    return ended_records
