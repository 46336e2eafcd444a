"""The number of concurrent trials, and what their processes import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from search_drive import Drive, space
from session_settings import make_session

from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.execution.session import SearchLimiter, trial_limit
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES

HEAVY = ("ray.tune", "ray.train", "torch", "transformers", "pandas", "pyarrow")
LARGE = Cluster((Node(8, 8, 2.0**40),))
JOINED = replace(LARGE, local=False)


def test_a_lane_of_each_trainer_waits_for_the_next_free_slot() -> None:
    assert trial_limit(make_session(2, 4, cluster=LARGE), capacities=[4, 4]) == 2 * (4 + 1)
    assert trial_limit(make_session(3, 1, cluster=LARGE), capacities=[1, 1, 1]) == 3 * (1 + 1)


def test_on_this_machine_trials_start_when_trainers_are_there() -> None:
    here = make_session(2, 8, cluster=LARGE)
    assert trial_limit(here) == 2
    assert trial_limit(here, capacities=[8]) == (8 + 1) + 1
    assert trial_limit(replace(here, cluster=JOINED)) == 2 * (8 + 1)


def test_a_joined_cluster_may_grow() -> None:
    assert trial_limit(make_session(2, 4, cluster=JOINED, elastic=True)) == 2 * 2 * (4 + 1)
    assert trial_limit(make_session(2, 4, cluster=JOINED)) == 2 * (4 + 1)
    assert trial_limit(make_session(2, 4, gpus=1, cluster=JOINED, elastic=True)) == 8 * (4 + 1)


def test_memory_of_nodes_that_an_autoscaler_may_start_counts() -> None:
    head = Cluster((Node(4, 0, 10 * 2 * TRIAL_MEMORY_BYTES),), local=False)
    growing = make_session(1, 4, gpus=1, cluster=head, elastic=True, autoscaler_capacity=16)
    assert trial_limit(growing) == 10
    assert trial_limit(replace(growing, autoscaler_memory=50 * 2 * TRIAL_MEMORY_BYTES)) == 50
    assert trial_limit(replace(growing, autoscaler_memory=2.0**40)) == 16 * (4 + 1)


def test_no_point_of_a_search_is_suggested_before_it_can_train() -> None:
    assert trial_limit(make_session(2, 4, cluster=LARGE), is_search=True) == 2 * 4
    assert trial_limit(make_session(1, 1, cluster=LARGE), is_search=True) == 1


def test_the_trials_of_trainers_that_measure_follow_their_lanes() -> None:
    measured = make_session(2, 8, gpus=1, cluster=LARGE, elastic=True, measures_lanes=True)
    assert trial_limit(measured, capacities=[8, 6]) == (8 + 1) + (6 + 1)
    assert trial_limit(measured, capacities=[1, 1]) == 2 * (4 + 1), "not measured yet"
    assert trial_limit(measured, is_search=True) == 2 * 4
    assert make_session(1, 2, gpus=1, measures_lanes=True).settings.expected_lanes == 2
    assert make_session(1, 8).settings.expected_lanes == 8


def test_a_search_follows_the_lanes_that_trainers_measure() -> None:
    measured = make_session(2, 8, gpus=1, cluster=LARGE, elastic=True, measures_lanes=True)

    def limit(*capacities: int) -> int | None:
        return trial_limit(measured, is_search=True, capacities=capacities)

    assert limit() == 2 * 4
    assert limit(8) == 8 + 4, "the other trainer has not measured"
    assert limit(8, 8) == 2 * 8
    assert limit(2, 2) == 2 * 2, "no point is suggested before it can train"
    assert limit(12, 8) == 2 * 8, "no more than the trainer may choose"
    assert limit(8, 8, 8) == 2 * 8
    small = Cluster((Node(8, 2, 10 * 2 * TRIAL_MEMORY_BYTES),))
    assert trial_limit(replace(measured, cluster=small), is_search=True, capacities=[8, 8]) == 10


def test_the_limit_of_a_running_search_rises_and_falls(tmp_path: Path) -> None:
    search = Drive(tmp_path, space("alpha=log:4:64", variants=("lora",)), points=9).search
    limiter = SearchLimiter(search, 2)
    numbers = count()

    def suggest_all() -> int:
        """Ask until the limit is reached, as Tune does. Returns the number of unfinished points."""
        while isinstance(limiter.suggest(f"t{next(numbers)}"), dict):
            pass
        return len(limiter.live_trials)

    def end_one() -> None:
        limiter.on_trial_complete(min(limiter.live_trials), {"state": "finished", "score": 0.5, "step": 90})

    assert suggest_all() == 2
    limiter.max_concurrent = 5
    assert suggest_all() == 5
    limiter.max_concurrent = 3
    end_one()
    assert suggest_all() == 4
    end_one()
    end_one()
    assert suggest_all() == 3


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
