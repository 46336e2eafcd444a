"""What a scheduler decides about stored curves, without Ray: the study's own delegate over Tune's schedulers,
asked about one result after another. Lanes take turns, one evaluation each. A replay in a second, to look
around with; Hyperband, which pauses trials, needs the real path (replay_schedulers.py without --here)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rehearsal import add_estimated_losses, curve_from_record

from orchestrator.execution.tune.early_stopping import PerVariantScheduler
from orchestrator.execution.tune.rungs import lane_evaluation_steps
from orchestrator.execution.tune.trial import WORST_LOSS
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration


class _Trial:
    """As much of Tune's as schedulers look at."""

    status = "RUNNING"

    def __init__(self, configuration: Configuration) -> None:
        self.trial_id = configuration.fingerprint
        self.config = {"configuration": configuration.to_json()}


def reported_losses(
    configuration: Configuration, record: Record, loss_window: int
) -> list[tuple[int, float]]:
    """(step, loss) as the trial of `point` would tell Tune, from the stored record of the same training."""
    curve = curve_from_record(record)
    curve = add_estimated_losses(curve, configuration, loss_window) if loss_window else curve
    reports = [
        (step, curve.scores[step, "validation"]["loss"])
        for step in lane_evaluation_steps(configuration)
        if step <= record.steps
    ]
    if record.state == "diverged":
        last_step = reports[-1][0] if reports else 0
        reports.append(
            (
                next((step for step in lane_evaluation_steps(configuration) if step > last_step), last_step),
                WORST_LOSS,
            )
        )
    return reports


def simulate_scheduler(
    scheduler: str,
    configurations: Sequence[Configuration],
    records: Mapping[str, Record],
    max_concurrent_trials: int,
    loss_window: int = 0,
) -> list[Record]:
    """The records that a study of `points`, entered in this order, would leave; `records` are the whole ones,
    by the fingerprints of the points."""
    tune_scheduler: Any = PerVariantScheduler(scheduler)
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
