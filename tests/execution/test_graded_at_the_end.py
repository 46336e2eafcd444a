"""Tasks that are graded at their last evaluation only.

At each earlier evaluation, Tune receives the loss, and the floor as the score.
"""

from __future__ import annotations

import math

from points import configuration

from orchestrator.execution.tune.trial import LaneTrial


def test_metrics_before_the_last_evaluation_are_finite() -> None:
    trial = object.__new__(LaneTrial)  # the constructor looks for the broker
    trial.configuration = configuration()
    task = trial.configuration.task
    on_the_way = trial._metrics(4, {"loss": 1.5})
    at_the_end = trial._metrics(8, {"loss": 1.0, task.metric: 0.25})
    assert (on_the_way["loss"], on_the_way["score"]) == (1.5, task.floor)
    assert (at_the_end["loss"], at_the_end["score"]) == (1.0, 0.25)
    assert all(math.isfinite(v) for result in (on_the_way, at_the_end) for v in result.values())
