"""Early stopping on the whole path, with real Ray and Tune: lanes are stopped, resumed, killed and parked.

A lane of 24 steps is evaluated after 8, 16 and 24 steps. A scheduler may stop it at each evaluation.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.options import StudyOptions

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMALL = ("--variants", "lora", "--seeds", "1", "--steps", "24", "--trainers", "1")
# Lanes with rates of 1e-1 and above learn nothing.
GRID = ("--learning-rates", "1e-3", "3e-3", "1e-2", "1e-1", "3e-1")
BETTER = 0.001  # a validation loss that no lane reaches in 24 steps


def known(output: Path, *rates: str, task: str = "letters") -> set[str]:
    """Put results that are better than any other into the store, and return their fingerprints."""
    options = StudyOptions(
        task=(task,), variants=("lora",), learning_rates=rates, seeds=1, steps=24, output=output
    )
    return study.keep_known(options, loss=BETTER)


def validated(record: Record) -> list[int]:
    return [e.step for e in record.evaluations if e.split == "validation"]


def steps_said(out: str) -> tuple[int, int]:
    found = re.search(r"(\d+) optimizer steps of (\d+) for all configurations to the end", out)
    assert found, out
    return int(found[1]), int(found[2])


@pytest.mark.nightly
def test_kill_9_in_the_middle_of_asha_loses_nothing(
    cluster: Cluster, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three known results are better than the results of four new lanes, so ASHA stops the new lanes.

    On an empty rung, a new lane would be the first one and would go on.
    """
    store = Store(output / "store")
    task = study.hold(tmp_path / "task", store, records=4, step=3)
    before = known(output, "1e-3", "2e-3", "3e-3", task=str(task))
    grid = (*SMALL, "--task", str(task), "--learning-rates", "1e-3", "2e-3", "3e-3", "4e-3", "5e-3", "6e-3")
    grid = (*grid, "7e-3", "--lanes-per-trainer", "1")
    asha = (*grid, "--widen", "0", "--scheduler", "asha")
    process = study.start(output, *asha, address=cluster.address)
    # The first new lane has been stopped, and another one is on its way to the rung.
    study.wait_for(lambda: study.held(task), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = study.records(output)
    assert 4 <= len(there) < 7
    assert before < set(there)
    on_the_rung = study.half_trained(output, 8) - set(there)

    assert study.run_here(output, *asha, address=cluster.address) == 0
    out = capsys.readouterr().out
    assert f"{len(there)} of 7 known" in out
    left = 7 - len(there)
    assert f"{left} of them stopped early" in out
    assert steps_said(out) == (8 * (left - len(on_the_rung)), 24 * left)
    now = study.records(output)
    assert len(now) == 7
    assert {f: now[f] for f in there} == there, "what has a record is not trained again"
    for fingerprint in set(now) - before:
        record = now[fingerprint]
        assert (record.state, record.steps, record.stopped_at) == ("stopped", 8, 8)
        assert record.stopping_settings == "asha loss=min first=8 eta=4 last=8"
        assert validated(record) == [8]
        assert len(record.curve) == 8
        assert (store.checkpoints / fingerprint).exists()
    name = "lr_sensitivity-held_task-letters-base"
    assert sorted(study.children(output, name)) == sorted((f, "FINISHED") for f in now)

    for arguments, count in ((asha, 7), (grid, 3)):
        assert study.run_here(output, *arguments, "--plan") == 0
        assert f"Configurations  7, of them {count} known" in capsys.readouterr().out


@pytest.mark.nightly
def test_what_was_stopped_early_goes_on_in_a_full_grid(
    cluster: Cluster, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The trainer has a place for each lane, so no lane is returned in favor of another.
    grid = (*SMALL, *GRID, "--lanes-per-trainer", "5", "--widen", "0")
    assert study.run_here(output, *grid, "--scheduler", "asha", address=cluster.address) == 0
    stopped = [r for r in study.records(output).values() if r.state == "stopped"]
    assert stopped
    assert study.run_here(output, *grid, address=cluster.address) == 0
    assert f"{5 - len(stopped)} of 5 known" in capsys.readouterr().out
    records = list(study.records(output).values())
    assert {(r.state, r.steps) for r in records} == {("finished", 24)}
    assert all(validated(r) == [8, 16, 24] and len(r.curve) == 24 for r in records)
    gone_on = [r for r in records if r.provenance.resumed_from]
    assert {r.fingerprint for r in gone_on} == {r.fingerprint for r in stopped}
    assert all(r.provenance.resumed_from == (8,) for r in gone_on)
