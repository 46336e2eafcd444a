"""The limits of a run, its live line and its plain lines, with a clock that only the test advances."""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import points
import pytest
from rich.console import Console

from orchestrator.execution import progress as progress_module
from orchestrator.execution.progress import INTERRUPTED, Progress, RunBudget, format_duration
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

NOW = 100_000.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the time that `Progress` sees; a test may set `now.seconds`."""
    now = SimpleNamespace(seconds=NOW)
    fixed = SimpleNamespace(monotonic=lambda: now.seconds, strftime=time.strftime)
    monkeypatch.setattr(progress_module, "time", fixed)
    return now


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 1 s"),
        (120, "2 min"),
        (3599.7, "1 h"),
        (7384, "2 h 3 min"),
        (-3, "0 s"),
    ],
)
def test_durations_are_formatted(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


def test_the_line_begins_with_what_matters_most(tmp_path: Path, now: SimpleNamespace) -> None:
    screen = io.StringIO()
    progress = Progress(tmp_path, 5000, 4000, Console(file=screen, width=80))
    progress.training, progress.live_trainers = 64, 8
    progress.ended = Counter(finished=626, diverged=120, stopped=250, failed=3)
    progress.best = 0.987, "rslora 0.000316"
    progress.max_steps = 60_000
    progress.count_steps(1)
    progress.count_steps(30_000)
    now.seconds += 7000
    line = progress.status_line()
    assert line.startswith("4999/5000 done | 1 h 57 min left | 3 failed | 120 diverged | 250 stopped | ")
    progress.refresh()
    assert screen.getvalue().splitlines() == [line], "one line in a log"


def test_the_time_left_is_known_after_a_few_steps(tmp_path: Path, now: SimpleNamespace) -> None:
    """No lane has to end first, and a lane that diverged early does not make the others short."""
    with Progress(tmp_path, 8, 0, Console(file=io.StringIO(), width=80)) as progress:
        record = points.record(points.configuration(seed=0), "diverged", steps=2)
        steps = record.configuration.lr_schedule.steps
        progress.training, progress.max_steps = 4, 8 * steps
        progress.count_steps(4)
        now.seconds += 100  # the first steps may have waited for the base model
        assert progress.seconds_left() is None
        progress.count_steps(24)
        assert progress.seconds_left() == pytest.approx(5 * (8 * steps - 24))
        progress.add_record(record)
        assert progress.seconds_left() == pytest.approx(5 * (7 * steps + 2 - 24))
        progress.count_steps(8 * steps)  # with repeated steps
        assert progress.seconds_left() is None, "not 0 s, while lanes are in training"


def test_without_a_terminal_it_writes_lines_and_keeps_others_out(
    tmp_path: Path, now: SimpleNamespace
) -> None:
    screen = io.StringIO()
    with Progress(tmp_path, 3, 1, Console(file=screen, width=80)) as progress:
        print("noise of a library")
        progress.notify("Ray started here")
        progress.refresh()
        now.seconds += timeouts.PLAIN_LINE_INTERVAL_SECONDS - 1
        progress.refresh()
        now.seconds += 2
        progress.training = 1
        progress.refresh()
    assert screen.getvalue().splitlines() == [
        "Ray started here",
        "1/3 done | trainers start | 0 training",
        "1/3 done | trainers start | 1 training",
    ]
    assert "noise of a library" in (tmp_path / "ray.log").read_text()
    assert "Ray started here" in (tmp_path / "study.log").read_text()


def test_failed_lanes_are_not_counted_as_trained(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 4, 0, Console(file=io.StringIO(), width=80))
    progress.ended = Counter(finished=1, failed=3)
    assert progress.describe_ended(24) == "1 trained in 24 s, 3 failed"
    progress.ended = Counter(finished=1, stopped=2)
    assert progress.describe_ended(24) == "3 trained in 24 s, 2 of them stopped early"


# -- the limits of a run; studies that end at a limit are in test_two_studies.py


def test_gpu_hours_count_from_a_trainers_first_call_to_its_last() -> None:
    budget = RunBudget(started_at=0.0)
    budget.set_gpus_per_trainer(0.5 * 2)  # two workers on half a GPU each
    for trainers, now in ((0, 100.0), (2, 200.0), (2, 1100.0), (1, 2900.0), (0, 4700.0), (0, 9000.0)):
        assert budget.update(trainers, now) == ""
    # Two trainers ran for 900 s, and for 1800 s until the end of one of them was noticed; then one trainer
    # ran for 1800 s.
    assert budget.used_gpu_hours == pytest.approx((2 * 900 + 2 * 1800 + 1800) / 3600)
    assert budget.format_usage() == "2 GPU hours"


def test_the_first_limit_ends_the_study_and_stays_the_reason() -> None:
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


def test_ctrl_c_comes_before_every_limit_and_gets_ten_seconds(now: SimpleNamespace) -> None:
    now.seconds = 3600.5
    budget = RunBudget(max_hours=1.0, started_at=0.0)
    assert budget.interrupt_seconds_left() == math.inf
    assert budget.update(1, 3600.0) == "--max-hours 1"
    budget.request_stop()
    assert budget.update(1, 3601.0) == INTERRUPTED
    assert budget.is_interrupted
    assert budget.interrupt_seconds_left() == 10
    now.seconds += 4.0
    assert budget.interrupt_seconds_left() == 6


def test_a_limit_on_gpus_needs_trainers_that_hold_some() -> None:
    with pytest.raises(UsageError, match=r"--max-gpu-hours 3: .* hold no GPU; take --max-hours"):
        RunBudget(max_gpu_hours=3.0).set_gpus_per_trainer(0.0)
    RunBudget(max_hours=3.0).set_gpus_per_trainer(0.0)
    with pytest.raises(UsageError, match=r"--max-gpu-hours 3 with --gpus-per-worker 0"):
        StudyOptions(max_gpu_hours=3.0, gpus_per_worker=0.0)
