"""Garbage collection of the files that crashes leave in a store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR

from orchestrator.record.maintenance import find_garbage, remove_garbage
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

LONG_AGO = 10_000.0


def _checkpoint(store: Store, fingerprint: str, age: float = LONG_AGO) -> Path:
    folder = store.checkpoints / fingerprint / "1"
    folder.mkdir(parents=True)
    (folder / "step-00000010.safetensors").write_bytes(b"x" * 100)
    _age(folder.parent, age)
    return folder.parent


def _age(path: Path, age: float) -> None:
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - age, time.time() - age))


def _file(path: Path, age: float = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 50)
    _age(path, age)
    return path


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results" / "store")


def _collect(store: Store, output: Path) -> dict[str, list[Path]]:
    """Remove the garbage, and return what was found."""
    found = find_garbage(store, output)
    assert all(path.exists() for paths in found.values() for path in paths), "nothing is removed by looking"
    remove_garbage(store, found)
    return {kind: paths for kind, paths in found.items() if paths}


def test_checkpoints_are_removed_only_after_a_final_record(store, tmp_path, make_record):
    output, folders = tmp_path / "results", {}
    for seed, state in enumerate(("finished", "diverged", "stopped", "failed")):
        record = make_record(seed=seed, state=state)
        store.put(record)
        folders[state] = _checkpoint(store, record.fingerprint)
    folders["training"] = _checkpoint(store, make_record(seed=8).fingerprint)
    (store.checkpoints / "notes").mkdir()
    assert len(_collect(store, output)) == 1
    assert {name for name, folder in folders.items() if folder.exists()} == {"stopped", "failed", "training"}
    assert _collect(store, output) == {}, "a second call finds nothing"
    assert (store.checkpoints / "notes").exists()


def test_old_temporary_files_of_every_writer_are_removed(store, tmp_path, make_record):
    output, hexes = tmp_path / "results", "0123456789abcdef" * 2
    record = make_record(seed=1)
    store.put(record)
    shard = store.records_folder / record.fingerprint[:2]
    StudyFile("rates", "", "").write(output / "rates")
    old = [
        _file(shard / f".{record.fingerprint}.json.{hexes}"),
        _file(shard / f".{record.fingerprint}.json.torn"),
        _file(store.root / f".records.parquet.{hexes}"),
        _file(store.root / ".mlflow.db.new"),
        _file(store.root / ".probe-abc" / "a").parent,
        _file(output / ".probe-17"),
        _file(output / "rates" / f".study.json.{hexes}"),
        _file(output / "rates" / f".report.html.{hexes}"),
        _file(store.root / f".check-{hexes}" / "driver").parent,
        _file(store.bases / f".hub-org--model.json.{hexes}"),
        _file(store.adapters / "best" / f".{record.fingerprint}.safetensors.{hexes}"),
        _file(store.calibration / f".e.safetensors.{hexes}"),
        _file(store.data / f".letters-0123456789abcdef.rows.arrow.{hexes}"),
        _file(store.bases / ".letters-base-ab12cd_4" / "model" / "weights").parents[1],
        _file(store.checkpoints / ("f" * 64) / "1" / f".step-00000010.safetensors.{hexes}"),
    ]
    for path in old:
        _age(path, LONG_AGO)
    kept = [
        _file(shard / f".{'e' * 64}.json.{hexes}", age=5),  # A process may be writing this file now.
        _file(shard / ".lock"),
        _file(store.bases / ".letters-base.lock"),
        _file(store.data / ".letters.lock"),
        _file(store.data / "letters-0123456789abcdef.rows.arrow"),
        _file(output / "rates" / ".lock"),
        _file(store.root / ".nfs0000001"),
        _file(output / "rates" / "report.html"),
    ]
    assert set(_collect(store, output)["temporary files"]) == {path.resolve() for path in old}
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in kept)
    assert store.get(record.fingerprint).to_json() == record.to_json()


def test_the_command_prints_what_it_removes(run, store, make_record):
    record = make_record(seed=1)
    store.put(record)
    _checkpoint(store, record.fingerprint)
    line = "checkpoints and records of lanes that have ended: 1 (100 bytes)"
    expected = [("--dry-run", f"would remove\n{line}\n"), ("--no-dry-run", f"removes\n{line}\n")]
    for option, said in [*expected, ("--no-dry-run", "no garbage\n")]:
        done = run(ORCHESTRATOR, "gc", option)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
