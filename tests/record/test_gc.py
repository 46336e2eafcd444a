"""Garbage collection of the files that crashes leave in a store."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from in_process import ORCHESTRATOR
from safetensors.numpy import save_file

from orchestrator.analyze.report import write_report
from orchestrator.finetune.sources import base_store
from orchestrator.record import gc
from orchestrator.record.gc import collect_garbage
from orchestrator.record.kept_adapters import StudyAdapters, file_name
from orchestrator.record.merge import merge_stores
from orchestrator.record.parquet import write_parquet
from orchestrator.record.scratch import scratch_folder
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.atomic_files import temporary_path

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


def _counts(totals: Mapping[str, gc.FileTotal]) -> dict[str, int]:
    return {kind: total.count for kind, total in totals.items()}


def test_checkpoints_are_removed_only_after_a_final_record(store, tmp_path, make_record):
    output = tmp_path / "results"
    folders = {}
    for seed, state in enumerate(("finished", "diverged", "stopped", "failed")):
        record = make_record(seed=seed, state=state)
        store.put(record)
        folders[state] = _checkpoint(store, record.fingerprint)
    training, other = make_record(seed=8).fingerprint, make_record(seed=9).fingerprint
    failed = folders["failed"].name
    StudyFile("rates", "", "", (training, failed)).write(output / "rates")
    folders["training"], folders["unreferenced"] = (
        _checkpoint(store, training),
        _checkpoint(store, other),
    )
    foreign = store.checkpoints / "notes"
    foreign.mkdir()

    before = {name for name, folder in folders.items() if folder.exists()}
    seen = collect_garbage(store, output, dry_run=True)
    assert {name for name, folder in folders.items() if folder.exists()} == before, (
        "a dry run removes nothing"
    )
    assert collect_garbage(store, output) == seen
    assert _counts(seen.removed) == {gc.ENDED_CHECKPOINTS: 2}
    assert seen.removed[gc.ENDED_CHECKPOINTS].bytes == 200
    assert _counts(seen.skipped) == {
        gc.STOPPED_CHECKPOINTS: 1,
        gc.RESUMABLE_CHECKPOINTS: 2,
        gc.UNREFERENCED_CHECKPOINTS: 1,
    }
    assert {name for name, folder in folders.items() if folder.exists()} == before - {"finished", "diverged"}
    assert foreign.exists()
    assert collect_garbage(store, output).removed == {}, "a second call finds nothing"

    assert _counts(collect_garbage(store, output, include_stopped=True).removed) == {
        gc.STOPPED_CHECKPOINTS: 1
    }
    assert not folders["stopped"].exists()
    assert store.get(folders["stopped"].name).state == "stopped"


def test_a_stopped_lane_that_may_be_in_use_stays(store, tmp_path, make_record):
    output = tmp_path / "results"
    wanted, young = make_record(seed=1, state="stopped"), make_record(seed=2, state="stopped")
    for record in (wanted, young):
        store.put(record)
    _checkpoint(store, wanted.fingerprint)
    _checkpoint(store, young.fingerprint, age=5)
    StudyFile("rates", "", "", (wanted.fingerprint,)).write(output / "rates")
    with FileLock(output / "rates" / ".lock"):  # A running study holds this lock.
        found = collect_garbage(store, output, include_stopped=True)
        assert (_counts(found.removed), _counts(found.skipped)) == ({}, {gc.IN_USE: 2})
    found = collect_garbage(store, output, include_stopped=True)
    assert (_counts(found.removed), _counts(found.skipped)) == ({gc.STOPPED_CHECKPOINTS: 1}, {gc.IN_USE: 1})
    assert (output / "rates" / ".lock").exists()


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
        _file(store.adapters / "rates" / "best" / f".{record.fingerprint}-ab.safetensors.{hexes}"),
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
    found = collect_garbage(store, output)
    assert _counts(found.removed) == {gc.TEMPORARY_FILES: len(old)}
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in kept)
    assert found.skipped[gc.IN_USE].count == 1
    assert store.get(record.fingerprint).to_json() == record.to_json()


@pytest.mark.parametrize("writer", ["report", "parquet", "record", "study", "pointer", "adapters of a merge"])
def test_files_of_a_writer_that_dies_before_its_rename_are_removed(store, tmp_path, make_record, writer):
    output, record = tmp_path / "results", make_record(seed=1)
    other = Store(tmp_path / "other")
    other.put(record)
    store.put(record)
    folder = StudyAdapters(other, tmp_path / "s").folder("best")
    folder.mkdir(parents=True)
    save_file({"a": np.zeros(2)}, folder / file_name(record))
    write = {
        "report": lambda: write_report(StudyFile("s", "", "python x"), [record], output / "s", ""),
        "parquet": lambda: write_parquet(store),
        "record": lambda: store.put(make_record(seed=2)),
        "study": lambda: StudyFile("s", "", "").write(output / "s"),
        "pointer": lambda: base_store.base_entries(store.bases).write_entry(
            "hub-a--b", {"commit": "c"}, "commit"
        ),
        "adapters of a merge": lambda: merge_stores(store, other),
    }[writer]
    StudyFile("s", "", "").write(output / "s")
    before = {path for path in output.rglob("*") if path.is_file()}
    if (child := os.fork()) == 0:
        link = os.link
        os.replace = lambda *names: os._exit(0)
        # A merge links records before it copies adapters.
        os.link = lambda *names: (
            link(*names) if "merge" in writer and "records" in str(names[1]) else os._exit(0)
        )
        setattr(Path, "rename", lambda *names: os._exit(0))  # noqa: B010
        write()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "the writer has not renamed a file"
    left = {path for path in output.rglob("*") if path.is_file()} - before
    assert left, "the writer has left no temporary file"
    for path in left:
        _age(path, LONG_AGO)
        _age(path.parent, LONG_AGO)
    collect_garbage(store, output)
    assert not [path for path in left if path.exists()]
    assert {path for path in output.rglob("*") if path.is_file()} == before


def test_what_a_killed_export_has_left_is_removed(store, tmp_path):
    """Not that of an export that runs, or that was interrupted a short time ago and can go on."""
    output = tmp_path / "results"
    StudyFile("rates", "", "").write(output / "rates")
    folders = {name: output / "rates" / f".export-{name * 64}" for name in "abc"}
    for name, folder in folders.items():
        _file(folder / "lock")
        _file(folder / "checkpoints" / "1" / "step-00000010.safetensors")
        _age(folder / "checkpoints", 0 if name == "b" else LONG_AGO)
        os.utime(folder, (time.time() - LONG_AGO,) * 2)
    draft = _file(temporary_path(output / "rates" / "export" / "lora") / "model.safetensors")
    _age(draft.parent, LONG_AGO)
    with FileLock(folders["c"] / "lock"):
        for dry_run in (True, False):
            found = collect_garbage(store, output, dry_run=dry_run)
            assert _counts(found.removed) == {gc.TEMPORARY_FILES: 1, gc.ENDED_EXPORTS: 1}
            assert _counts(found.skipped) == {gc.IN_USE: 2}
    assert [name for name, folder in folders.items() if folder.exists()] == ["b", "c"]
    assert not draft.parent.exists()


def test_adapters_that_a_killed_driver_has_left_are_removed(store, tmp_path, make_record):
    """Those that `--save-adapters all` keeps stay, and so do those of a study that runs or goes on."""
    output, records = tmp_path / "results", [make_record(seed=seed) for seed in range(2)]
    adapters = StudyAdapters(store, output / "rates")
    for record in records:
        store.put(record)
        for keep in ("best", "all"):
            _file(adapters.folder(keep) / file_name(record))
    _file(adapters.folder("best") / f"{'f' * 64}-0123456789ab.safetensors")  # of a trainer that was killed
    unknown = _file(store.adapters / "another" / "best" / file_name(records[0]))
    names = tuple(record.fingerprint for record in records)
    complete, going_on = StudyFile("rates", "", "", names), StudyFile("rates", "", "", (*names, "e" * 64))

    def choose_best(study: StudyFile, own: object) -> set[str]:
        assert study.name == "rates"
        return {names[1]}

    def collect() -> dict[str, int]:
        return _counts(collect_garbage(store, output, choose_best=choose_best).removed)

    going_on.write(output / "rates")
    assert collect() == {}
    complete.write(output / "rates")
    with FileLock(output / "rates" / ".lock"):
        assert collect() == {}
    assert collect() == {gc.OTHER_ADAPTERS: 2}
    assert [path.name for path in adapters.files("best")] == [file_name(records[1])]
    assert len(adapters.files("all")) == 2
    assert unknown.exists()
    _file(store.adapters / names[0] / "adapter_model.safetensors")  # as earlier versions kept it
    kept = collect_garbage(store, output, choose_best=choose_best).skipped
    assert _counts(kept) == {gc.UNKNOWN_ADAPTERS: 1, gc.OLD_ADAPTERS: 1}


def test_a_record_beside_a_final_one_is_removed(store, tmp_path, make_record):
    """The writer died between writing the final record and removing the stopped record."""
    store.put(make_record(seed=1, state="stopped"))
    (stopped,) = store.records_folder.glob("*/*.stopped.json")
    data = stopped.read_bytes()
    store.put(make_record(seed=1))
    stopped.write_bytes(data)
    assert _counts(collect_garbage(store, tmp_path / "results").removed) == {gc.SUPERSEDED_RECORDS: 1}
    assert list(store.states().values()) == ["finished"]


def test_only_scratch_folders_of_dead_processes_on_this_host_are_removed(store, tmp_path):
    host = os.uname().nodename
    dead = _file(store.root / "scratch" / f"{host}-12-0123abcd" / "tune" / "x").parents[1]
    lock = _file(dead.with_name(f"{dead.name}.lock"))
    others = _file(store.root / "scratch" / "another-12-0123abcd" / "x").parent
    stray = _file(store.root / "scratch" / f"{host}-foo" / "x").parent
    with scratch_folder(store) as alive:
        would = collect_garbage(store, tmp_path / "results", dry_run=True)
        assert dead.exists()
        assert lock.exists()
        found = collect_garbage(store, tmp_path / "results")
        assert _counts(would.removed) == _counts(found.removed) == {gc.STALE_SCRATCH: 1}
        assert _counts(would.skipped) == _counts(found.skipped) == {gc.IN_USE: 1, gc.OTHER_HOST_SCRATCH: 2}
        there = [path.exists() for path in (dead, lock, alive, others, stray)]
    assert there == [False, False, True, True, True]


def test_the_command_prints_what_it_removes(run, store, make_record):
    record = make_record(seed=1)
    store.put(record)
    _checkpoint(store, record.fingerprint)
    lines = ["100 bytes", "  1 checkpoints of lanes that have ended (100 bytes)"]
    expected = [("--dry-run", f"would remove {lines[0]}\n{lines[1]}\n")]
    expected += [("--no-dry-run", f"removed {lines[0]}\n{lines[1]}\n"), ("--no-dry-run", "removed 0 bytes\n")]
    for option, said in expected:
        done = run(ORCHESTRATOR, "gc", option)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    wrong = run(ORCHESTRATOR, "gc", "--older-than", "-1")
    wrong.assert_refused("error: --older-than -1: must be 0 hours or more; the default is 1.\n")
    run(ORCHESTRATOR, "gc", "--output", "elsewhere").assert_refused("no store here")


def test_the_checkpoint_beside_a_damaged_record_stays(store, tmp_path, make_record):
    """The damaged record counts as missing; the checkpoint and the stopped record beside it are needed."""
    record = make_record(seed=1)
    store.put(make_record(seed=1, state="stopped"))
    (stopped,) = store.records_folder.glob("*/*.stopped.json")
    data = stopped.read_bytes()
    store.put(record)
    stopped.write_bytes(data)
    folder = _checkpoint(store, record.fingerprint)
    (final,) = set(store.records_folder.glob("*/*.json")) - {stopped}
    final.write_bytes(final.read_bytes().replace(b'"tokens":4096', b'"tokens":4097'))
    collect_garbage(Store(store.root), tmp_path / "results")
    assert stopped.exists()
    assert folder.exists()
