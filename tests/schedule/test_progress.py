from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.schedule.progress import Best, Progress, clock


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59.4, "59 s"), (61, "1:01"), (7384, "2:03:04"), (-3, "0 s")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_the_line_fits_80_columns_when_everything_is_long(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 5000, 4000, Console(file=io.StringIO(), width=80))
    progress.done, progress.training, progress.seats = 999, 64, 8
    progress.diverged, progress.stopped, progress.failed = 120, 250, 3
    progress.best = Best(0.987, "rslora", 3.16e-4)
    progress.first_lane = progress.started - 7000
    assert len(progress.line()) <= 80
    progress.total = progress.known = 99_000
    progress.diverged, progress.stopped, progress.failed = 12_000, 25_000, 300
    progress.first_lane = progress.started - 70_000
    assert len(progress.line()) <= 80


def test_without_a_terminal_it_writes_lines_and_keeps_others_out(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Progress(tmp_path, 3, 1, Console(file=screen, width=80)) as progress:
        print("noise of a library")
        progress.say("Ray started here")
        progress.show()
        progress.show()
    assert screen.getvalue().splitlines() == ["Ray started here", "1/3 done | 0 training | seats start"]
    assert "noise of a library" in (tmp_path / "ray.log").read_text()
    assert "Ray started here" in (tmp_path / "study.log").read_text()
