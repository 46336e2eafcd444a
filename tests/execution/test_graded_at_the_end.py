"""A task may have its answers graded at its last evaluation only: until then Tune hears the loss, and the
floor in place of a score."""

from __future__ import annotations

import math

from points import configuration

from orchestrator.execution.tune.trial import LaneTrainable


def test_tune_is_told_finite_numbers_on_the_way() -> None:
    trial = object.__new__(LaneTrainable)  # Tune's own start would begin a process
    trial.configuration = configuration()
    task = trial.configuration.task
    on_the_way = trial._metrics(4, {"loss": 1.5})
    at_the_end = trial._metrics(8, {"loss": 1.0, task.metric: 0.25})
    assert (on_the_way["loss"], on_the_way["score"]) == (1.5, task.floor)
    assert (at_the_end["loss"], at_the_end["score"]) == (1.0, 0.25)
    assert all(math.isfinite(v) for result in (on_the_way, at_the_end) for v in result.values())
