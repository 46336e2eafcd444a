"""A store and studies of an earlier version can be read, reported and continued.

`tests/data/earlier_store.tar.gz` was made on 2026-11-27 by these two commands at commit cbc1d90. The archive
does not contain the caches and MLflow's files.

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
ARCHIVE = ROOT / "tests" / "data" / "earlier_store.tar.gz"
STUDIES = {"old-grid": {"finished": 8}, "old-search": {"finished": 4, "stopped": 4}}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return an output folder with the earlier store and its two studies."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "results", filter="data")
    return tmp_path / "results"


@pytest.mark.parametrize("name", STUDIES)
def test_every_record_of_an_earlier_study_is_read(results: Path, name: str) -> None:
    store, (_, study) = Store(results / "store", create=False), find_study(results, name)
    records = [store.get(fingerprint) for fingerprint in study.configurations]
    states = [record.state for record in records if record is not None]
    assert {state: states.count(state) for state in states} == STUDIES[name]
    assert [r.configuration.fingerprint for r in records if r] == list(study.configurations)


@pytest.mark.parametrize("name", STUDIES)
def test_an_earlier_study_is_not_trained_again(results: Path, name: str, run: Run) -> None:
    command = shlex.split(find_study(results, name)[1].command)
    ended = run(ROOT / command[1], *command[2:], "--plan")
    assert ended.returncode == 0, ended.stderr
    assert "Configurations  8, of them 8 known" in ended.stdout


@pytest.mark.parametrize("name", STUDIES)
def test_an_earlier_study_is_reported_again(results: Path, name: str, run: Run) -> None:
    ended = run(ROOT / "orchestrator" / "__main__.py", "report", name)
    assert ended.returncode == 0, ended.stderr
    assert "8 of 8 configurations" in ended.stdout
