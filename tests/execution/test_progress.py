"""The live line and the plain lines of a study, with a clock that only the test advances."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import points
import pytest
from rich.console import Console

from orchestrator.execution import progress as progress_module
from orchestrator.execution.progress import Progress, format_duration
from orchestrator.util import timeouts

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


def test_the_line_fits_80_columns_when_everything_is_long(tmp_path: Path, now: SimpleNamespace) -> None:
    progress = Progress(tmp_path, 5000, 4000, Console(file=io.StringIO(), width=80))
    progress.training, progress.live_trainers = 64, 8
    progress.ended = Counter(finished=626, diverged=120, stopped=250, failed=3)
    progress.best = 0.987, "rslora 0.000316"
    progress.max_steps = 60_000
    progress.count_steps(1)
    progress.count_steps(30_000)
    now.seconds += 7000
    assert progress.status_line().endswith(" left")
    assert len(progress.status_line()) <= 80
    progress.total, progress.cached = 99_300, 62_000
    progress.ended = Counter(diverged=12_000, stopped=25_000, failed=300)
    assert len(progress.status_line()) <= 80


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
        "1/3 done | 0 training | trainers start",
        "1/3 done | 1 training | trainers start",
    ]
    assert "noise of a library" in (tmp_path / "ray.log").read_text()
    assert "Ray started here" in (tmp_path / "study.log").read_text()


def test_failed_lanes_are_not_counted_as_trained(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 4, 0, Console(file=io.StringIO(), width=80))
    progress.ended = Counter(finished=1, failed=3)
    assert progress.describe_ended(24) == "1 trained in 24 s, 3 failed"
    progress.ended = Counter(finished=1, stopped=2)
    assert progress.describe_ended(24) == "3 trained in 24 s, 2 of them stopped early"
