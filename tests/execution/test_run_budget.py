"""The limits of a run. Studies that end at a limit are in test_two_studies.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from orchestrator.execution.run_budget import INTERRUPTED, RunBudget
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError


def test_gpu_hours_count_from_a_trainers_first_call_to_its_last():
    budget = RunBudget(started_at=0.0)
    budget.set_gpus_per_trainer(0.5 * 2)  # two workers on half a GPU each
    for trainers, now in ((0, 100.0), (2, 200.0), (2, 1100.0), (1, 2900.0), (0, 4700.0), (0, 9000.0)):
        assert budget.update(trainers, now) == ""
    # Two trainers ran for 900 s, and for 1800 s until the end of one of them was noticed; then one trainer
    # ran for 1800 s.
    assert budget.used_gpu_hours == pytest.approx((2 * 900 + 2 * 1800 + 1800) / 3600)
    assert budget.format_usage() == "2 GPU hours"


def test_the_first_limit_ends_the_study_and_stays_the_reason():
    budget = RunBudget(max_hours=2.0, max_gpu_hours=1.0, started_at=0.0)
    budget.set_gpus_per_trainer(1.0)
    assert budget.update(1, 0.0) == ""
    assert budget.update(1, 3599.0) == ""
    assert budget.update(1, 3601.0) == "--max-gpu-hours 1"
    assert budget.update(1, 2 * 3600 + 1.0) == "--max-gpu-hours 1"
    assert not budget.is_interrupted
    time_budget = RunBudget(max_hours=0.5, started_at=50.0)
    assert (time_budget.update(0, 1849.0), time_budget.update(0, 1850.0)) == ("", "--max-hours 0.5")
    assert time_budget.format_usage() == "", "without GPUs there is nothing to say"


def test_ctrl_c_comes_before_every_limit_and_gets_ten_seconds(monkeypatch):
    monkeypatch.setattr("orchestrator.execution.run_budget.time", SimpleNamespace(monotonic=lambda: now))
    now = 3600.5
    budget = RunBudget(max_hours=1.0, started_at=0.0)
    assert budget.interrupt_seconds_left() == math.inf
    assert budget.update(1, 3600.0) == "--max-hours 1"
    budget.request_stop()
    assert budget.update(1, 3601.0) == INTERRUPTED
    assert budget.is_interrupted
    assert budget.interrupt_seconds_left() == 10
    now += 4.0
    assert budget.interrupt_seconds_left() == 6


def test_a_limit_on_gpus_needs_trainers_that_hold_some():
    with pytest.raises(UsageError, match=r"--max-gpu-hours 3: .* hold no GPU; take --max-hours"):
        RunBudget(max_gpu_hours=3.0).set_gpus_per_trainer(0.0)
    RunBudget(max_hours=3.0).set_gpus_per_trainer(0.0)
    with pytest.raises(UsageError, match=r"--max-gpu-hours 3 with --gpus-per-worker 0"):
        StudyOptions(max_gpu_hours=3.0, gpus_per_worker=0.0)
