"""A trainer of two Ray Train workers gives the results of one worker, and dies and is replaced as a whole.

tests/finetune/engine/test_process_group.py tests the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import alone
import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.schema import Record
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

TWO = ("--trainers", "1", "--workers-per-trainer", "2", "--accumulation", "2", "--gradient-checkpointing")
SMALL = ("--variants", "lora", "--seeds", "1", "--steps", "12", "--learning-rates", "1e-3", "1e-2")


def test_two_workers_give_what_one_gives(
    cluster: Cluster, output: Path, letters_bases: Path, tmp_path: Path
) -> None:
    assert study.run_here(output, *SMALL, *TWO, address=cluster.address) == 0
    both = study.records(output)
    assert [record.provenance.resumed_from for record in both.values()] == [()] * 2
    they_are_as_of_one_worker(both, letters_bases, tmp_path / "alone")


@pytest.mark.nightly
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_dies_takes_its_trainer_with_it_and_nothing_is_lost(
    cluster: Cluster, output: Path, letters_bases: Path, tmp_path: Path, which: int
) -> None:
    task = study.hold(tmp_path / "task", Store(output / "store"), records=0, step=6)
    tasks.load(str(task))  # this process trains with it, too
    process = study.start(output, *SMALL, *TWO, "--task", str(task), address=cluster.address)
    study.wait_for(lambda: study.held(task), process)
    workers = study.titled("RayTrainWorker")
    assert len(workers) == 2
    workers[which].kill()
    study.wait_for(lambda: not any(worker.is_running() for worker in workers), process)
    code, out, err = study.end(process)
    assert code == 0, out + err
    assert out.count("trainer-0 died") == 1
    both = study.records(output)
    assert [record.provenance.resumed_from for record in both.values()] == [(4,)] * 2
    they_are_as_of_one_worker(both, letters_bases, tmp_path / "alone")


def they_are_as_of_one_worker(both: Mapping[str, Record], bases: Path, folder: Path) -> None:
    """Check that both lanes have finished with the losses that one worker computes."""
    assert [record.state for record in both.values()] == ["finished"] * 2
    expected = alone.train((record.configuration for record in both.values()), bases, folder)
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
