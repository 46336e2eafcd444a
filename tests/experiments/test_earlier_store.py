"""Stores and studies of earlier versions can be read, reported and continued.

Each archive in `tests/data` was made by the two commands below, and does not contain the caches and MLflow's
files: `earlier_store` on 2026-11-27 at commit cbc1d90, with version 2 of the loop's numerics, and
`earlier_store_2` on 2026-11-28 with version 3.

    python experiments/lr_sensitivity.py --dry-run --variants lora head_only --learning-rates 1e-3 1e-2 \
        --seeds 2 --task reviews --steps 12 --study old-grid
    python experiments/lr_sensitivity.py --dry-run --variants lora pissa --search optuna --points 4 \
        --task reviews --steps 12 --scheduler asha --study old-search
"""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import pytest
from in_process import Run

from orchestrator.record.store import Store
from orchestrator.record.study_file import find_study

ROOT = Path(__file__).parents[2]
STATES = {
    ("earlier_store", "old-grid"): {"finished": 8},
    ("earlier_store", "old-search"): {"finished": 4, "stopped": 4},
    ("earlier_store_2", "old-grid"): {"finished": 8},
    ("earlier_store_2", "old-search"): {"finished": 3, "stopped": 5},
}
"""Archive and study -> number of records in each state."""


@pytest.fixture
def results(tmp_path: Path, archive: str) -> Path:
    """Return an output folder with an earlier store and its two studies."""
    with tarfile.open(ROOT / "tests" / "data" / f"{archive}.tar.gz") as file:
        file.extractall(tmp_path / "results", filter="data")
    return tmp_path / "results"


@pytest.mark.parametrize(("archive", "name"), STATES)
def test_every_record_of_an_earlier_study_is_read(results: Path, archive: str, name: str) -> None:
    store, (_, study) = Store(results / "store", create=False), find_study(results, name)
    records = [store.get(fingerprint) for fingerprint in study.configurations]
    states = [record.state for record in records if record is not None]
    assert {state: states.count(state) for state in states} == STATES[archive, name]
    assert [r.configuration.fingerprint for r in records if r] == list(study.configurations)


@pytest.mark.parametrize("archive", ["earlier_store_2"])
@pytest.mark.parametrize("name", ["old-grid", "old-search"])
def test_a_study_of_the_same_numerics_is_not_trained_again(results: Path, name: str, run: Run) -> None:
    command = shlex.split(find_study(results, name)[1].command)
    ended = run(ROOT / command[1], *command[2:], "--plan")
    assert ended.returncode == 0, ended.stderr
    assert "Configurations  8, of them 8 known" in ended.stdout


@pytest.mark.parametrize("archive", ["earlier_store"])
def test_results_of_earlier_numerics_do_not_count(results: Path, run: Run) -> None:
    command = shlex.split(find_study(results, "old-grid")[1].command)
    ended = run(ROOT / command[1], *command[2:], "--plan")
    assert ended.returncode == 0, ended.stderr
    assert "Configurations  8, of them 0 known" in ended.stdout


@pytest.mark.parametrize("archive", ["earlier_store"])
def test_a_search_of_earlier_numerics_is_refused(results: Path, run: Run) -> None:
    command = shlex.split(find_study(results, "old-search")[1].command)
    ended = run(ROOT / command[1], *command[2:], "--plan")
    assert ended.returncode == 2
    assert "asked for points under earlier numerics of the loop" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("archive", "name"), STATES)
def test_an_earlier_study_is_reported_again(results: Path, name: str, run: Run) -> None:
    ended = run(ROOT / "orchestrator" / "__main__.py", "report", name)
    assert ended.returncode == 0, ended.stderr
    assert "8 of 8 configurations" in ended.stdout
