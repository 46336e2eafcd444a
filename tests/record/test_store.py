from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.schema import Record, RecordState
from orchestrator.record.store import Store
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _file(store: Store, record: Record, kind: str = "") -> Path:
    return store.records_folder / record.fingerprint[:2] / f"{record.fingerprint}{kind}.json"


def test_a_stored_record_is_read_unchanged_with_nan_and_infinities(store, make_record):
    for seed, state in enumerate(("finished", "diverged", "stopped", "failed")):
        record = make_record(state=state, seed=seed)
        assert store.put(record)
        back = store.get(record.fingerprint)
        assert repr(back) == repr(record)  # They are compared as text, because NaN is not equal to itself.
    assert math.isnan(store.get(make_record(seed=1).fingerprint).curve[-1].loss)


def test_a_stopped_record_is_reusable_with_equal_settings_only(store, make_record):
    stopped = make_record(state="stopped")
    fingerprint = stopped.fingerprint
    assert store.get_reusable(fingerprint, "asha 4") is None
    store.put(stopped)
    assert store.get_reusable(fingerprint) is None
    assert store.get_reusable(fingerprint, "asha 2") is None
    assert store.get_reusable(fingerprint, "asha 4").state == "stopped"
    store.put(make_record(state="failed"))
    assert store.get(fingerprint).state == "failed"
    assert store.get_reusable(fingerprint, "asha 4").state == "stopped"
    store.put(make_record(state="diverged"))
    assert {store.get_reusable(fingerprint, s).state for s in ("", "asha 2", "asha 4")} == {"diverged"}


def test_states_sees_changes_of_another_process(store, make_record):
    store.put(make_record(state="stopped"))
    assert list(store.states().values()) == ["stopped"]
    Store(store.root).put(make_record(state="finished"))
    assert list(store.states().values()) == ["finished"]


def _text_of(store: Store, record: Record) -> str:
    store.put(record)
    return _file(store, record).read_text()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda text: text[: len(text) // 2], id="torn"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: "[]\n", id="foreign"),
        pytest.param(lambda text: text.replace('"steps":20,', '"steps":"x",'), id="edited"),
        pytest.param(lambda text: text.replace('"curve":[', '"curve":{', 1), id="broken inside"),
    ],
)
def test_a_file_that_is_no_record_is_skipped_with_one_warning(store, make_record, caplog, spoil):
    good, bad = make_record(seed=1), make_record(seed=2)
    store.put(good)
    store.put(bad)
    path = _file(store, bad)
    path.write_text(spoil(path.read_text()))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [r.fingerprint for r in store.records()] == [good.fingerprint]
            assert store.get(bad.fingerprint) is None
            assert store.states() == {good.fingerprint: "finished"}
    assert len([m for m in caplog.messages if path.name in m]) == 1
    assert store.put(bad)  # Such a file must not prevent a new record of the configuration.
    assert store.states() == {good.fingerprint: "finished", bad.fingerprint: "finished"}


def test_a_file_under_a_wrong_name_is_skipped(store, make_record, caplog):
    good, other = make_record(seed=1), make_record(seed=2)
    store.put(good)
    path = _file(store, other)
    path.parent.mkdir(exist_ok=True)
    path.write_text(_file(store, good).read_text())
    (path.parent / "notes.txt").write_text("mine")
    assert list(store.states()) == [good.fingerprint]
    assert store.get(other.fingerprint) is None
    assert sorted(m.split(" ")[0].split("/")[-1] for m in caplog.messages) == sorted([path.name, "notes.txt"])


def test_an_unknown_schema_version_is_named(store, make_record):
    record = make_record()
    data = {**json.loads(_text_of(store, record)), "schema_version": 7}
    del data["sha256"]
    _file(store, record).write_bytes(atomic_files.add_checksum(json.dumps(data)))
    for read in (lambda: store.get(record.fingerprint), store.states, lambda: list(store.records())):
        with pytest.raises(UsageError, match="schema version 7, this program reads 1"):
            read()


def test_a_flipped_bit_never_changes_a_record(store, make_record, caplog):
    """After a bit of any third byte is flipped, the record is skipped with a warning, or unchanged."""
    record = make_record()
    whole = _text_of(store, record).encode()
    path = _file(store, record)
    skipped = 0
    places = range(0, len(whole), 3)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        caplog.clear()
        found = Store(store.root).get(record.fingerprint)
        assert found is None or repr(found) == repr(record), place
        assert (found is None) == ("skipped" in caplog.text), place
        skipped += found is None
    assert skipped > 0.9 * len(places)


def test_first_digits_name_one_record(store, make_record):
    made = [make_record(seed=seed) for seed in range(40)]
    for record in made:
        store.put(record)
    wanted = made[7].fingerprint
    assert store.resolve_prefix(wanted[:20].upper()) == wanted
    first = [r.fingerprint for r in made if r.fingerprint[0] == wanted[0]]
    assert len(first) > 1
    with pytest.raises(UsageError, match=rf"{len(first)} records begin with it.*{sorted(first)[0][:12]}"):
        store.resolve_prefix(wanted[0])
    with pytest.raises(UsageError, match=r"no record in .* begins with it"):
        store.resolve_prefix("0" * 30)
    with pytest.raises(UsageError, match="hexadecimal"):
        store.resolve_prefix("lora")


def test_a_full_disk_leaves_no_file(store, make_record, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.put(make_record())
    assert store.states() == {}
    assert not list(_file(store, make_record()).parent.iterdir())


def _race(root: Path, barrier, wins, number: int, records: list[Record]) -> None:
    store = Store(root)
    for index, record in enumerate(records):
        barrier.wait()
        # Each process writes its own state and number of steps, so that the file shows which process won.
        mine = replace(record, steps=number, state="finished" if number % 2 else "diverged")
        if store.put(mine):
            wins.put((index, number))


def test_one_of_several_writing_processes_wins(store, make_record):
    """Four processes write each record. For every second record there is an incomplete file in its place."""
    records = [make_record(seed=seed) for seed in range(60)]
    for record in records[::2]:
        _file(store, record).parent.mkdir(exist_ok=True)
        _file(store, record).write_text('{"schema_version":1,')
    # A forked process could inherit a lock that another thread holds.
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(4), context.SimpleQueue()
    arguments = [(store.root, barrier, wins, number, records) for number in range(4)]
    processes = [context.Process(target=_race, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    winners: dict[int, list[int]] = {}
    while not wins.empty():
        index, number = wins.get()
        winners.setdefault(index, []).append(number)
    assert sorted(winners) == list(range(60))
    for index, record in enumerate(records):
        (number,) = winners[index]
        assert store.get(record.fingerprint).steps == number
    visible = [f for shard in store.records_folder.iterdir() for f in shard.iterdir() if f.name[0] != "."]
    assert len(visible) == 60


def test_the_file_is_plain_json_without_nan(store, make_record):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = _text_of(store, make_record(state="diverged"))
    assert json.loads(text, parse_constant=refuse)["curve"][-1]["loss"] == "NaN"


@pytest.mark.parametrize(
    ("state", "name"), [("stopped", ""), ("failed", ""), ("finished", ".stopped"), ("stopped", ".failed")]
)
def test_a_record_under_the_name_of_another_state_is_skipped(store, make_record, caplog, state, name):
    """Under the name of a final record, a stopped or failed lane would count as trained to its end."""
    record = make_record(state=state)
    store.put(record)
    (path,) = store.records_folder.glob("*/*.json")
    path.rename(_file(store, record, name))
    again = Store(store.root)
    assert again.get_reusable(record.fingerprint) is None
    assert again.get(record.fingerprint) is None
    assert again.states() == {}
    assert f"does not have the name of a {state} record" in caplog.text
    assert again.put(make_record(state="diverged"))
    assert list(Store(store.root).states().values()) == ["diverged"]


_STATES: Sequence[RecordState] = ("finished", "diverged", "stopped", "failed")
_writes = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(_STATES)), max_size=12)


@given(writes=_writes, reopen=st.booleans())
def test_a_final_record_is_never_lost_or_overwritten(make_record, writes, reopen):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        model: dict[str, tuple[RecordState, int]] = {}
        failures: dict[str, int] = {}
        for number, (seed, state) in enumerate(writes):
            record = make_record(seed=seed, state=state, steps=20 + number)
            fingerprint = record.fingerprint
            before = model.get(fingerprint)
            has_final = before is not None and before[0] in ("finished", "diverged")
            assert store.put(record) is not has_final
            if not has_final:
                model[fingerprint] = (state, record.steps)
                failures[fingerprint] = failures.get(fingerprint, 0) + 1 if state == "failed" else 0
            if reopen:
                store = Store(folder)
            assert store.states() == {f: s for f, (s, _) in model.items()}
            kept = store.get(fingerprint)
            assert (kept.state, kept.steps) == model[fingerprint]
            reusable = store.get_reusable(fingerprint)
            assert (reusable is not None) == (model[fingerprint][0] in ("finished", "diverged"))
            assert store.count_failures(fingerprint) == failures[fingerprint]
        assert {r.fingerprint: (r.state, r.steps) for r in store.records()} == model


# -- scratch folders

HOLD = """
import sys
from orchestrator.record.store import Store
with Store(sys.argv[1]).scratch_folder() as folder:
    (folder / "tune").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(store: Store) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process that holds a scratch folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def folder_names(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "scratch").iterdir())


def test_the_folder_goes_with_the_study(store: Store, driver: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = driver
    assert folder.is_dir()
    process.communicate("")
    assert folder_names(store) == []


def test_the_folder_of_a_killed_driver_is_removed_by_the_next_command(
    store: Store, driver: tuple[subprocess.Popen[str], Path]
) -> None:
    process, folder = driver
    process.kill()
    process.wait()
    assert (folder / "tune").exists()
    store.remove_stale_scratch()
    assert folder_names(store) == []


def test_the_folder_of_a_running_driver_stays_even_if_no_process_has_its_number(
    store: Store, driver: tuple[subprocess.Popen[str], Path]
) -> None:
    """The driver may run in a container with this host's name, so no process here has its number."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _, made = driver
    folder = made.with_name(f"{os.uname().nodename}-{gone.pid}-0123abcd")
    # The driver keeps the lock, because it is a lock of the file, not of its name.
    for suffix in ("", ".lock"):
        made.with_name(made.name + suffix).rename(folder.with_name(folder.name + suffix))
    store.remove_stale_scratch()
    assert (folder / "tune").exists()
    assert store.stale_scratch() == []


def test_folders_with_other_names_are_left_alone(store: Store) -> None:
    host = os.uname().nodename
    names = sorted([f"{host}-foo", f"{host}-", f"{host}-12-0123abcd.lock", "another-12-0123abcd", "notes"])
    for name in names:
        (store.root / "scratch" / name).mkdir(parents=True)
    store.remove_stale_scratch()
    assert folder_names(store) == names
