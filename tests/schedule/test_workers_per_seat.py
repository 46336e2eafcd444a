"""A seat of two Ray Train workers: the results of one, and a seat that dies as a whole and is replaced."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import study

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

TWO = ("--seats", "1", "--workers-per-seat", "2")
SMALL = ("--variants", "lora", "hira", "--seeds", "1", "--steps", "12", "--learning-rates", "1e-3", "1e-2")


def records(output: Path) -> dict[str, Record]:
    return {record.fingerprint: record for record in Store(output / "store").records()}


@pytest.mark.timeout(400)
def test_two_workers_give_what_one_gives(output: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(output, alone)
    code, out, err = study.run(output, *SMALL, *TWO, "--accumulation", "2", "--gradient-checkpointing")
    assert code == 0, out + err
    code, out, err = study.run(alone, *SMALL, "--seats", "1", "--accumulation", "2")
    assert code == 0, out + err
    both, expected = records(output), records(alone)
    assert set(both) == set(expected)  # how it is computed is no part of what is asked
    assert len(both) == 4
    for fingerprint, record in both.items():
        other = expected[fingerprint]
        assert (record.provenance.workers, other.provenance.workers) == (2, 1)
        assert (record.state, record.steps, record.cost.tokens) == ("finished", 12, other.cost.tokens)
        for mine, theirs in zip(record.curve, other.curve, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
            assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-2)
        for split in ("validation", "test"):
            losses = [e.scores["loss"] for e in record.evaluations if e.split == split]
            assert losses == pytest.approx(
                [e.scores["loss"] for e in other.evaluations if e.split == split], rel=1e-3
            )


def train_workers(of: psutil.Process) -> list[psutil.Process]:
    """The Ray Train workers below a study's process."""
    found = []
    for process in of.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_dies_takes_its_seat_with_it_and_nothing_is_lost(output: Path, which: int) -> None:
    arguments = ("--variants", "lora", "--seeds", "2", "--steps", "300", "--learning-rates", "1e-3", "1e-2")
    process = study.start(output, *arguments, *TWO)
    driver = psutil.Process(process.pid)
    study.wait_for(lambda: bool(study.half_trained(output, 200)), 150, process)
    workers = sorted(train_workers(driver), key=lambda p: p.create_time())
    assert len(workers) == 2
    os.kill(workers[which].pid, signal.SIGKILL)
    code, out, err = study.end(process)
    assert code == 0, out + err
    assert "seat-0 died" in out
    assert not workers[1 - which].is_running()
    found = records(output)
    assert {record.state for record in found.values()} == {"finished"}
    assert len(found) == 4
    assert any(record.provenance.resumed_from for record in found.values())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--workers-per-seat", "2", "--gpus-per-seat", "0.5"),
            ["--workers-per-seat 2", "--gpus-per-seat 0.5", "NCCL"],
        ),
        (("--workers-per-seat", "1000000", "--batch-size", "8"), ["--workers-per-seat 1000000"]),
        (("--workers-per-seat", "0"), ["--workers-per-seat 0"]),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(
    output: Path, arguments: tuple[str, ...], said: list[str]
) -> None:
    code, out, err = study.run(output, *SMALL, *arguments)
    assert code == 2, out + err
    assert "Ray started" not in out
    line = err.strip().splitlines()[-1]
    for part in said:
        assert part in line
