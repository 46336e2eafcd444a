"""What ASHA has stopped is trained to the end by a later study without early stopping.

A lane of 24 steps is evaluated after 8, 16 and 24 steps. A scheduler may stop it at each evaluation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.record.schema import Record

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMALL = ("--variants", "lora", "--seeds", "1", "--steps", "24", "--trainers", "1")
# Lanes with rates of 1e-1 and above learn nothing.
GRID = ("--learning-rates", "1e-3", "3e-3", "1e-2", "1e-1", "3e-1")


def validated(record: Record) -> list[int]:
    return [e.step for e in record.evaluations if e.split == "validation"]


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
