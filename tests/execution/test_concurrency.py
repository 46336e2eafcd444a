"""The number of concurrent trials, and what their processes import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from points import configuration
from ray.tune.search import Searcher
from session_settings import make_session

from orchestrator.execution.ray_cluster import Cluster, Node
from orchestrator.execution.session import MAX_COLLECTING_TRIALS, lane_limit, trial_limit
from orchestrator.execution.trial import TRIAL_MEMORY_BYTES
from orchestrator.execution.tune import ConfigurationQueue

HEAVY = ("ray.tune", "ray.train", "torch", "transformers", "pandas", "pyarrow")
LARGE = Cluster((Node(8, 8, 2.0**40),))
JOINED = replace(LARGE, local=False)


def test_in_a_grid_as_many_lanes_wait_as_trainers_hold_and_few_trials_collect() -> None:
    grid = make_session(2, 4, cluster=LARGE)
    assert lane_limit(grid) == 2 * 4
    assert lane_limit(grid, [4, 4]) == 2 * (2 * 4)
    assert trial_limit(grid, 16) == MAX_COLLECTING_TRIALS
    assert trial_limit(grid, 1) == 1


def test_under_early_stopping_a_lane_of_each_trainer_waits_and_each_has_a_trial() -> None:
    asha = make_session(2, 8, cluster=LARGE, scheduler="asha")
    assert lane_limit(asha) == 2, "trials start when trainers are there"
    assert lane_limit(asha, [8]) == (8 + 1) + 1
    assert lane_limit(asha, [8, 8]) == trial_limit(asha, 2 * (8 + 1)) == 2 * (8 + 1)
    assert lane_limit(replace(asha, cluster=JOINED)) == 2 * (8 + 1)


def test_a_joined_cluster_may_grow() -> None:
    assert lane_limit(make_session(2, 4, cluster=JOINED, elastic=True)) == 2 * 2 * (4 + 1)
    assert lane_limit(make_session(2, 4, cluster=JOINED)) == 2 * 4
    with_gpus = make_session(2, 4, gpus=1, cluster=JOINED, elastic=True)
    assert lane_limit(with_gpus) == 8 * (4 + 1)
    assert lane_limit(with_gpus, [4] * 9) == 2 * 9 * (4 + 1)


def test_one_point_of_a_search_for_each_trainer_is_suggested_before_it_is_known_to_train() -> None:
    search = make_session(2, 4, cluster=LARGE)
    assert lane_limit(search, num_training=0) == 2 * 4
    assert lane_limit(make_session(1, 1, cluster=LARGE), num_training=0) == 1
    assert lane_limit(search, [4, 4], 3) == 3 + 2, "the lanes of other group keys cannot join"
    assert lane_limit(search, [4, 4], 8) == 8, "no trainer has room"
    assert lane_limit(search, [4], 3) == 3 + 1 + 4, "a trainer starts"
    assert trial_limit(make_session(2, 4, cluster=LARGE), 8, is_search=True) == 8


def test_the_lanes_of_trainers_that_measure_follow_what_they_measure() -> None:
    measured = make_session(2, 8, gpus=1, cluster=LARGE, elastic=True, automatic_lanes=True)
    assert lane_limit(measured, [8, 6]) == 2 * (8 + 6)
    assert lane_limit(measured, [1, 1]) == 2 * (2 * 4), "not measured yet"
    assert make_session(1, 2, gpus=1, automatic_lanes=True).settings.expected_lanes == 2
    assert make_session(1, 8).settings.expected_lanes == 8


def test_a_search_follows_the_lanes_that_trainers_measure() -> None:
    measured = make_session(2, 8, gpus=1, cluster=LARGE, elastic=True, automatic_lanes=True)

    def limit(*capacities: int) -> int | None:
        return lane_limit(measured, capacities, 16)

    assert limit() == 2 * 4
    assert limit(8) == 8 + 4, "the other trainer has not measured"
    assert limit(8, 8) == 2 * 8
    assert limit(2, 2) == 2 * 2, "no point is suggested before it can train"
    assert limit(12, 8) == 2 * 8, "no more than the trainer may choose"
    assert limit(8, 8, 8) == 2 * 8
    small = Cluster((Node(8, 2, 10 * 2 * TRIAL_MEMORY_BYTES),))
    assert trial_limit(replace(measured, cluster=small), 16, is_search=True) == 10


@pytest.mark.parametrize("nodes", [1, 2, 40])
def test_trials_leave_half_of_the_memory_to_trainers(nodes: int) -> None:
    cluster = Cluster(tuple(Node(8, 2, 10 * 2 * TRIAL_MEMORY_BYTES) for _ in range(nodes)))
    session = make_session(2, 8, cluster=cluster, scheduler="median")
    assert trial_limit(session, 300) == min(300, 10 * nodes)


def test_the_limit_of_a_running_study_rises_and_falls() -> None:
    points = [replace(configuration(), seed=seed) for seed in range(9)]
    queue = ConfigurationQueue(lambda *call: None, points, 2)
    numbers = count()

    def suggest_all() -> int:
        """Ask until the limit is reached, as Tune does. Returns the number of unfinished trials."""
        while isinstance(queue.suggest(f"t{next(numbers)}"), dict):
            pass
        return len(queue.unfinished)

    def end_one(error: bool = False) -> None:
        queue.on_trial_complete(min(queue.unfinished), {"state": "finished"}, error)

    assert suggest_all() == 2
    queue.max_concurrent = 5
    assert suggest_all() == 5
    queue.max_concurrent = 3
    end_one()
    assert suggest_all() == 4
    end_one()
    end_one()
    assert suggest_all() == 3


def test_the_broker_hears_of_every_end_and_a_stage_follows_the_last() -> None:
    first, second = (replace(configuration(), seed=seed) for seed in (0, 1))
    stages = [[second], []]
    calls: list[tuple[Any, ...]] = []
    queue = ConfigurationQueue(lambda *call: calls.append(call), [first], 4, lambda: stages.pop(0))
    assert queue.suggest("first") == {"configuration": first}
    assert queue.suggest("another") is None, "the next stage depends on its result"
    queue.on_trial_complete("first", None, error=True)
    assert queue.suggest("next") == {"configuration": second}
    queue.on_trial_complete("next", {"state": "training", "step": 3})
    assert calls == [("release", "first"), ("stop", "next", second, 3)]
    assert queue.suggest("last") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("orchestrator.execution.trial", HEAVY),
        ("orchestrator.execution.broker_actor", HEAVY),
        ("orchestrator.execution.trainer_worker", HEAVY),
        ("orchestrator.execution.trainers", ("torch", "transformers")),
        ("orchestrator.execution.session", ("torch", "transformers")),
    ],
)
def test_the_start_of_a_process_imports_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    program = f"import {module}, sys; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
