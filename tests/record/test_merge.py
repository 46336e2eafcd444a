"""Merging of stores. In any order, the result equals a single store with all records."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import ORCHESTRATOR
from safetensors.numpy import save_file

from orchestrator.record.kept_adapters import StudyAdapters, file_name
from orchestrator.record.merge import merge_stores
from orchestrator.record.schema import Provenance
from orchestrator.record.store import Store
from orchestrator.util.atomic_files import add_checksum
from orchestrator.util.errors import UsageError


def _files(store: Store) -> dict[str, bytes]:
    return {str(p.relative_to(store.root)): p.read_bytes() for p in store.root.rglob("*") if p.is_file()}


def _checkpoint(store: Store, fingerprint: str, step: int, attempt: int = 1) -> Path:
    path = store.checkpoints / fingerprint / str(attempt) / f"step-{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.full(4, step, np.float32)}, path)
    return path


@pytest.fixture
def stores(tmp_path) -> tuple[Store, Store]:
    return Store(tmp_path / "here" / "store"), Store(tmp_path / "there" / "store")


def test_new_records_are_copied_and_local_ones_stay(stores, make_record):
    here, there = stores
    mine, theirs = make_record(seed=1, reason="mine"), make_record(seed=1, reason="theirs")
    here.put(mine)
    there.put(theirs)
    here.put(make_record(seed=2, state="stopped", steps=10))
    there.put(make_record(seed=2))
    here.put(make_record(seed=3))
    there.put(make_record(seed=3, state="failed"))
    there.put(make_record(seed=4, state="diverged"))
    summary = merge_stores(here, there)
    assert (summary.records, summary.already_present, summary.damaged) == (2, 2, 0)
    assert here.get(mine.fingerprint).reason == "mine", "the first final record stays"
    assert here.get(make_record(seed=2).fingerprint).state == "finished"
    assert sorted(here.states().values()) == ["diverged", "finished", "finished", "finished"]
    files = _files(here)
    again = merge_stores(here, there)
    assert (again.records, again.already_present) == (0, 4)
    assert _files(here) == files, "a second merge changes nothing"


def test_the_longer_stopped_and_the_more_often_failed_record_is_kept(stores, make_record):
    here, there = stores
    short, long = (
        make_record(seed=1, state="stopped", steps=5),
        make_record(seed=1, state="stopped", steps=15),
    )
    for first, second in ((here, there), (there, here)):
        first.put(short)
        second.put(long)
        merge_stores(first, second)
        merge_stores(second, first)
        assert first.get(long.fingerprint).steps == second.get(long.fingerprint).steps == 15
    failed = make_record(seed=2, state="failed")
    here.put(failed)
    there.put(failed)
    there.put(failed)
    merge_stores(here, there)
    assert here.count_failures(failed.fingerprint) == 2
    merge_stores(there, here)
    assert there.count_failures(failed.fingerprint) == 2


def test_damaged_files_are_skipped_with_a_warning(stores, caplog, make_record):
    here, there = stores
    for seed in (1, 2):
        there.put(make_record(seed=seed))
    name = make_record(seed=1).fingerprint
    (there.records_folder / name[:2] / f"{name}.json").write_bytes(b'{"schema_version":1,"fin')
    lane = make_record(seed=3).fingerprint
    damaged = _checkpoint(there, lane, 20)
    damaged.write_bytes(damaged.read_bytes()[:-4])
    _checkpoint(there, lane, 10)
    with caplog.at_level(logging.WARNING):
        summary = merge_stores(here, there)
    assert (summary.records, summary.lanes) == (1, 1)
    assert list(here.states()) == [make_record(seed=2).fingerprint]
    assert [p.name for p in here.checkpoints.rglob("*.safetensors")] == ["step-00000010.safetensors"]
    assert name in caplog.text
    assert str(damaged) in caplog.text


def test_a_damaged_local_record_is_replaced_by_a_whole_one(stores, make_record):
    here, there = stores
    whole = make_record(seed=1)
    there.put(whole)
    path = here.records_folder / whole.fingerprint[:2] / f"{whole.fingerprint}.json"
    path.parent.mkdir()
    path.write_bytes(b"{")
    assert merge_stores(here, there).records == 1
    assert here.get(whole.fingerprint).to_json() == whole.to_json()


def test_unfinished_lanes_continue_from_the_furthest_checkpoint(stores, make_record):
    here, there = stores
    further, behind, done = (make_record(seed=s).fingerprint for s in (1, 2, 3))
    here.put(make_record(seed=3))
    _checkpoint(here, further, 10)
    _checkpoint(there, further, 30, attempt=2)
    kept = _checkpoint(here, behind, 40)
    _checkpoint(there, behind, 20)
    _checkpoint(there, done, 20)
    before = kept.read_bytes()
    summary = merge_stores(here, there)
    assert summary.lanes == 1
    assert summary.bytes > 0
    found = sorted(
        str(p.relative_to(here.checkpoints / further)) for p in here.checkpoints.glob(f"{further}/*/*")
    )
    assert found == ["1/step-00000010.safetensors", "2/step-00000030.safetensors"]
    assert kept.read_bytes() == before
    assert not (here.checkpoints / done).exists(), "a finished lane needs none"
    assert not (here.checkpoints / behind / "1" / "step-00000020.safetensors").exists()
    assert merge_stores(here, there).lanes == 0


def test_a_lane_that_has_ended_elsewhere_keeps_no_local_checkpoint(stores, make_record):
    here, there = stores
    copied, present = make_record(seed=1), make_record(seed=2)
    there.put(copied)
    here.put(present)
    there.put(present)
    for record in (copied, present):
        _checkpoint(here, record.fingerprint, 10)
    merge_stores(here, there)
    assert list(here.checkpoints.iterdir()) == []


def test_bases_calibrations_and_adapters_of_copied_records_are_copied(stores, make_record):
    here, there = stores
    for store, text in ((here, "mine"), (there, "theirs")):
        for name, content in (("b-1", "same"), (f"b-{text}", text)):
            (store.bases / name).mkdir(parents=True)
            (store.bases / name / "config.json").write_text(content)
        (store.bases / "b.recipe.json").write_text(text)
        store.calibration.mkdir()
        save_file({"a": np.zeros(2)}, store.calibration / f"{text}.safetensors")
    (there.bases / ".b-abcdefgh").mkdir()  # This base model is incomplete.
    copied, other = make_record(seed=1), make_record(seed=2, reason="theirs")
    there.put(copied)
    there.put(other)
    here.put(make_record(seed=2, reason="mine", provenance=Provenance(host="another")))
    first, second = (there.root.parent / name for name in ("first", "second"))
    for one in (copied, other):
        folder = StudyAdapters(there, first).folder("all")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"a": np.zeros(2)}, folder / file_name(one))
    assert StudyAdapters(there, second).take_over(copied)
    summary = merge_stores(here, there)
    assert (summary.bases, summary.calibrations, summary.adapters) == (1, 1, 1)
    names = [str(path.relative_to(here.adapters)) for path in sorted(here.adapters.glob("*/*/*"))]
    assert names == [f"{study}/{file_name(copied)}" for study in ("first/all", "second/best")]
    assert len({path.stat().st_ino for path in sorted(here.adapters.glob("*/*/*"))}) == 1, "on the disk once"
    assert sorted(p.name for p in here.bases.iterdir()) == ["b-1", "b-mine", "b-theirs", "b.recipe.json"]
    assert (here.bases / "b.recipe.json").read_text() == "mine"
    files = _files(here)
    merge_stores(here, there)
    assert _files(here) == files


def test_tasks_and_variants_of_users_are_copied_and_old_adapters_are_named(stores, caplog):
    here, there = stores
    there.data.mkdir()
    names = [f"{kind}-0123456789abcdef.json" for kind in ("task", "variant")]
    for name in names:
        (there.data / name).write_bytes(add_checksum('{"path":"theirs"}'))
    damaged = there.data / "task-fedcba9876543210.json"
    damaged.write_bytes(add_checksum('{"path":"theirs"}').replace(b"theirs", b"others"))
    (there.data / "letters-0123456789abcdef.json").write_text("{}")  # Prepared data are made again.
    (there.adapters / ("f" * 64)).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        summary = merge_stores(here, there)
    assert (summary.own_files, summary.damaged) == (2, 1)
    assert {path.name: path.read_bytes() for path in here.data.iterdir()} == {
        name: (there.data / name).read_bytes() for name in names
    }
    assert f"{damaged} is damaged: skipped" in caplog.text
    assert f"{there.adapters}: 1 adapters of an earlier version are not copied" in caplog.text
    assert merge_stores(here, there).own_files == 0


def test_a_store_is_not_merged_with_itself_and_another_schema_is_refused(stores, make_record):
    here, there = stores
    with pytest.raises(UsageError, match="the store itself"):
        merge_stores(here, Store(here.root))
    newer = make_record(seed=1)
    there.put(newer)
    (path,) = there.records_folder.glob("*/*.json")
    data = {**json.loads(path.read_bytes()), "schema_version": 99}
    del data["sha256"]
    path.write_bytes(add_checksum(json.dumps(data)))
    with pytest.raises(UsageError, match="schema version 99"):
        merge_stores(here, Store(there.root))


def test_the_command_merges_all_and_names_the_next_one(run, tmp_path, make_record):
    for number in (1, 2):
        Store(tmp_path / f"other{number}").put(make_record(seed=number))
    merging = (ORCHESTRATOR, "merge", "--output", "joined")
    done = run(*merging, "other1", "other2")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, following = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/other1: 1 records copied, 0 present already; ")
    assert second.startswith(f"{tmp_path}/other2: 1 records copied, ")
    assert following == "Next: python -m orchestrator sync --output joined (Parquet and MLflow)"
    assert len(Store(tmp_path / "joined" / "store").states()) == 2
    run(*merging, "nowhere").assert_refused("there is no store here")
    run(*merging).assert_refused("name at least one other store")


# Each write is a seed, a state, a number of steps, and the second at which the record ended.
_WRITES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["finished", "stopped", "failed"]),
        st.integers(2, 19),
        st.integers(1, 9),
    ),
    max_size=8,
)


def _outcome(store: Store) -> dict[str, tuple[str, int, int]]:
    """Return the state, the steps of the current record, and the number of failures, by fingerprint."""
    return {f: (s, store.get(f).steps, store.count_failures(f)) for f, s in store.states().items()}


# Each example joins six stores.
@settings(max_examples=settings.default.max_examples // 5)
@given(writes=_WRITES, data=st.data())
def test_any_split_merged_in_any_order_gives_the_same_store(tmp_path_factory, make_record, writes, data):
    root = tmp_path_factory.mktemp("stores")
    parts = [Store(root / f"part{i}") for i in range(3)]
    records = [
        make_record(
            seed=seed,
            state=state,
            steps=20 if state == "finished" else steps,
            provenance=Provenance(started=1.0, ended=1.0 + ended),
        )
        for seed, state, steps, ended in writes
    ]
    for each in records:
        parts[data.draw(st.integers(0, 2))].put(each)
    outcomes = []
    for number, order in enumerate(itertools.permutations(parts)):
        joined = Store(root / f"joined{number}")
        for part in order:
            merge_stores(joined, part)
        outcomes.append(_outcome(joined))
        before = _files(joined)
        for part in order:
            merge_stores(joined, part)
        assert _files(joined) == before
    assert all(outcome == outcomes[0] for outcome in outcomes)

    # The merged store has a final record if any store had one, and otherwise the longest stopped record.
    for fingerprint in {r.fingerprint for r in records}:
        states = {r.state for r in records if r.fingerprint == fingerprint}
        if "finished" in states:
            assert outcomes[0][fingerprint][0] == "finished"
        else:
            stops = [r.steps for r in records if r.fingerprint == fingerprint and r.state == "stopped"]
            held = Store(root / "joined0").read_record(
                Store(root / "joined0").record_path(fingerprint, "stopped")
            )
            kept = [p.read_record(p.record_path(fingerprint, "stopped")) for p in parts]
            assert (held is not None) == bool(stops)
            if held is not None:
                assert held.steps == max(k.steps for k in kept if k is not None)
