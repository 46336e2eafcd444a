"""The number of concurrent trials, and what their processes import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayCluster

from orchestrator.execution.ray.private import light_trial_actors
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.execution.trainers.pool import PoolConfig
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.execution.tune.concurrency import trial_limits

HEAVY = ("ray.tune", "ray.train", "torch", "transformers", "pandas", "pyarrow")
LARGE = Cluster((Node(8, 8, 2.0**40),))


def pool(trainers: int, lanes: int, gpus: float = 0, **options: Any) -> PoolConfig:
    spec = TrainerSpec(lanes_per_trainer=lanes, gpus_per_worker=gpus, store="", scratch="", **options)
    return PoolConfig(trainers, spec, elastic=gpus > 0)


@pytest.mark.parametrize("scheduler", ["none", "asha", "median"])
def test_a_lane_of_each_trainer_waits_for_the_next_free_slot(scheduler: str) -> None:
    assert trial_limits(pool(2, 4), LARGE, scheduler)[0] == 2 * (4 + 1)
    assert trial_limits(pool(3, 1), LARGE, scheduler)[0] == 3 * (1 + 1)


def test_a_joined_cluster_may_grow() -> None:
    joined = replace(LARGE, local=False)
    assert trial_limits(replace(pool(2, 4), elastic=True), joined, "none")[0] == 2 * 2 * (4 + 1)
    assert trial_limits(pool(2, 4), joined, "none")[0] == 2 * (4 + 1)
    assert trial_limits(pool(2, 4, gpus=1), joined, "none")[0] == 8 * (4 + 1)


def test_no_point_of_a_search_is_suggested_before_it_can_train() -> None:
    assert trial_limits(pool(2, 4), LARGE, "none", is_search=True)[0] == 2 * 4
    assert trial_limits(pool(1, 1), LARGE, "asha", is_search=True)[0] == 1


def test_trainers_that_measure_may_get_as_many_trials_as_they_may_choose() -> None:
    measured = pool(8, 8, gpus=1, measures_lanes=True)
    assert trial_limits(measured, LARGE, "none")[0] == 8 * (8 + 1)
    assert trial_limits(measured, LARGE, "none", is_search=True)[0] == 8 * 4
    assert pool(1, 2, measures_lanes=True).spec.expected_lanes == 2
    assert pool(1, 8).spec.expected_lanes == 8


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("orchestrator.execution.tune.trial", HEAVY),
        ("orchestrator.execution.broker.actor", HEAVY),
        ("orchestrator.execution.trainers.trainer", HEAVY),
        ("orchestrator.execution.trainers.trainer_run", ("torch", "transformers")),
        ("orchestrator.execution.session", ("torch", "transformers")),
    ],
)
def test_the_start_of_a_process_imports_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    program = f"import {module}, sys; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def light_trial_class() -> type:
    """Return the class of an actor, as a local class, since workers cannot import this module."""

    class LightTrial:
        """The actor of a trial, which reports what its process has imported and how often it was used."""

        def __init__(self, config: dict[str, Any], storage: object = None) -> None:
            self.results = 0
            self.reset(config, storage)

        def reset(self, config: dict[str, Any], storage: object = None) -> bool:
            self.config, self.storage = config, storage
            return True

        def train(self) -> dict[str, Any]:
            self.results += 1
            return {
                "done": True,
                "training_iteration": 1,
                # Ray itself loads pyarrow for an actor that gets such arguments.
                "loaded": [name for name in HEAVY if name != "pyarrow" and name in sys.modules],
                "trial": self.config["__trial_info__"],
                "storage": self.storage,
                "x": self.config["x"],
                "results": self.results,
            }

        def get_auto_filled_metrics(self, debug_metrics_only: bool = True) -> dict[str, Any]:
            return {}

        def stop(self) -> None:
            pass

    return LightTrial


@pytest.mark.ray
def test_trials_run_in_processes_without_ray_tune(connected: RayCluster, tmp_path: Path) -> None:
    from ray import tune

    class Trainable(tune.Trainable):
        def step(self) -> dict[str, Any]:
            raise AssertionError("the light actor runs in its place")

    def fit(trainable: type) -> tune.ResultGrid:
        return tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}])),
            param_space={"x": tune.grid_search([1, 2, 3])},
            tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str(tmp_path),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()

    with light_trial_actors(Trainable, light_trial_class()):
        results = fit(Trainable)
    assert not results.errors
    last = [result.metrics for result in results]
    assert all(one is not None for one in last)
    assert [one["loaded"] for one in last if one] == [[], [], []]
    assert [one["x"] for one in last if one] == [1, 2, 3]
    assert {one["trial"] for one in last if one} == {one["trial_id"] for one in last if one}
    assert {one["storage"] for one in last if one} == {""}
    assert [one["results"] for one in last if one] == [1, 2, 3], "one process ran all three"

    class Ordinary(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {"done": True, "storage": type(self._storage).__name__}

    (first, *_) = fit(Ordinary)
    assert first.metrics is not None
    assert first.metrics["storage"] == "StorageContext", "afterwards, Tune's own actors are unchanged"
