"""The grid's trials, with Tune's own trial objects and without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from points import POINTS
from ray import tune
from ray.tune.experiment import Experiment

from orchestrator.schedule.in_order import InOrder
from orchestrator.study.configuration import Configuration


class Nothing(tune.Trainable):
    pass


def trials(search: InOrder, folder: Path) -> list[Any]:
    """As many as it gives now."""
    if not search.total_samples:
        search.add_configurations([Experiment("test", Nothing, storage_path=str(folder))])
    return list(iter(search.next_trial, None))


def test_every_configuration_is_one_trial_in_the_order_given(tmp_path: Path) -> None:
    points = [replace(point, seed=seed) for seed in range(40) for point in POINTS]
    search = InOrder(points)
    made = trials(search, tmp_path)
    assert [Configuration.from_json(trial.config["configuration"]) for trial in made] == points
    assert len({trial.trial_id for trial in made}) == len(points) == search.total_samples
    assert search.is_finished()


def test_no_more_trials_than_may_be_alive(tmp_path: Path) -> None:
    search = InOrder(POINTS, at_once=2)
    first = trials(search, tmp_path)
    assert len(first) == 2
    assert trials(search, tmp_path) == []
    search.on_trial_complete(first[1].trial_id)
    (third,) = trials(search, tmp_path)
    assert Configuration.from_json(third.config["configuration"]) == POINTS[2]
