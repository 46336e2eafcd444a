"""What a scheduler decides about stored curves, without Ray: the study's own delegate over Tune's schedulers,
asked about one result after another. Lanes take turns, one evaluation each. A replay in a second, to look
around with; Hyperband, which pauses trials, needs the real path (replay_schedulers.py without --here)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rehearsal import guessed, stored

from orchestrator.execution.tune.early_stopping import PerGroup
from orchestrator.execution.tune.rungs import due
from orchestrator.execution.tune.trial import WORST_LOSS
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration


class _Trial:
    """As much of Tune's as schedulers look at."""

    status = "RUNNING"

    def __init__(self, point: Configuration) -> None:
        self.trial_id = point.fingerprint
        self.config = {"configuration": point.to_json()}


def results(point: Configuration, record: Record, guess: int) -> list[tuple[int, float]]:
    """(step, loss) as the trial of `point` would tell Tune, from the stored record of the same training."""
    course = stored(record)
    course = guessed(course, point, guess) if guess else course
    told = [(step, course.scores[step, "validation"]["loss"]) for step in due(point) if step <= record.steps]
    if record.state == "diverged":
        reached = told[-1][0] if told else 0
        told.append((next((step for step in due(point) if step > reached), reached), WORST_LOSS))
    return told


def decide(
    scheduler: str,
    points: Sequence[Configuration],
    records: Mapping[str, Record],
    at_once: int,
    guess: int = 0,
) -> list[Record]:
    """The records that a study of `points`, entered in this order, would leave; `records` are the whole ones,
    by the fingerprints of the points."""
    delegate: Any = PerGroup(scheduler)
    waiting, left = deque(points), list[Record]()
    running: list[tuple[_Trial, Record, deque[tuple[int, float]]]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            point = waiting.popleft()
            trial, record = _Trial(point), records[point.fingerprint]
            delegate.on_trial_add(None, trial)
            whole = replace(record, configuration=point, fingerprint=point.fingerprint)
            running.append((trial, whole, deque(results(point, record, guess))))
        for each in list(running):
            trial, record, told = each
            step, loss = told.popleft()
            result = {"step": step, "loss": loss}
            stopped = delegate.on_trial_result(None, trial, result) == "STOP"
            if not told:
                delegate.on_trial_complete(None, trial, result)
                left.append(record)
            elif stopped:
                seen = tuple(e for e in record.evaluations if e.step <= step)
                left.append(replace(record, state="stopped", steps=step, stopped_at=step, evaluations=seen))
            if stopped or not told:
                running.remove(each)
    return left
