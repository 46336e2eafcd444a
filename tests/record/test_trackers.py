"""The trackers beside MLflow: the real libraries, read back from their files."""

from __future__ import annotations

import math
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from mlflow_server import empty_database
from rich.console import Console

from orchestrator.execution.progress import Progress
from orchestrator.launch.run import start_writers
from orchestrator.launch.study import TRACKERS
from orchestrator.record import run_values
from orchestrator.record.other_trackers import TensorBoardTracker, WandbTracker, run_id
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import StudyEnd, Tracker, TrackerWriter
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

STUDY = StudyFile("letters-study", "Which?", "python x.py")
KEY = "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7"
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let W&B write to files only, with a key that must appear in none of them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield
    wandb.teardown()  # W&B reads the environment once a process


def progress_of(record: Record, *steps: int) -> list[LaneProgress]:
    """Return the start of a record's lane, and its evaluations at these steps, as the driver sees them."""
    scores = {e.step: e.scores for e in record.evaluations if e.split == "validation"}
    shown = run_values.select_live_steps(record.curve, record.configuration.lr_schedule.steps, scores)
    found, previous = [LaneProgress(record.configuration)], 0
    for step in steps:
        since = tuple(each for each in shown if previous < each.step <= step)
        found.append(LaneProgress(record.configuration, step, scores[step], since))
        previous = step
    return found


def expected(record: Record, steps: Sequence[Any]) -> Points:
    """Return name -> (step, value) of a record, in the order of the steps."""
    found: Points = defaultdict(list)
    for key, step, value in run_values.untimed_values(record, steps):
        found[key].append((step, value))
    return found


def wandb_rows(folder: Path, identity: str) -> tuple[Points, dict[str, Any]]:
    """Read the newest offline run with an id: its history and its summary."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record as Entry

    wandb.teardown()  # W&B's own process has then written its files
    file = max(
        folder.glob(f"wandb/offline-run-*-{identity}/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )
    points: Points = defaultdict(list)
    run: dict[str, Any] = {"summary": {}}
    for data in leveldb_entries(file.read_bytes()):
        entry = Entry.FromString(data)
        kind = entry.WhichOneof("record_type")
        if kind == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item}
            step = int(items["_step"])
            for key, value in items.items():
                if not key.startswith("_"):
                    points[key].append((step, float(value)))
        elif kind == "run":
            run |= {"group": entry.run.run_group, "project": entry.run.project}
            run |= {"config": {i.key: json.loads(i.value_json) for i in entry.run.config.update}}
        elif kind == "summary":
            run["summary"] |= {i.key or i.nested_key[0]: i.value_json for i in entry.summary.update}
        elif kind == "exit":
            run["exit_code"] = entry.exit.exit_code
    return points, run


def leveldb_entries(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a file in LevelDB's log format, behind W&B's header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def tensorboard_points(folder: Path) -> tuple[Points, set[str]]:
    """Read the event files of a lane's folder: the scalars, and the tags of texts and hyperparameters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    points = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}
    return points, set(events.Tags()["tensors"]) | set(events.summary_metadata)


def same(found: Points, wanted: Points) -> None:
    """Assert that the points are equal; an infinite value is logged as NaN."""
    assert found.keys() == wanted.keys()
    for key, points in wanted.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        assert [value for _, value in found[key]] == pytest.approx(values, rel=1e-6, nan_ok=True), key


def test_wandb_has_one_run_a_lane_that_the_record_completes(tmp_path, make_record):
    record, stopped = make_record(steps=20), make_record(seed=1, state="diverged")
    first = WandbTracker(tmp_path)
    first.check()
    first.start(STUDY, {})
    for progress in [*progress_of(record, 5, 10), *progress_of(record, 5, 10)]:  # after a broker's restart
        first.log_progress(progress)
    first.finish(StudyEnd("KILLED"))
    identity = run_id(STUDY.name, record.fingerprint)
    points, run = wandb_rows(tmp_path, identity)
    assert [step for step, _ in points["train_loss"]] == list(range(1, 11))
    assert (run["group"], run["exit_code"]) == (STUDY.name, 1)
    assert run["config"]["learning_rate"] == 0.001

    # The driver was killed, and the same command continues. W&B names the folders of offline runs by seconds,
    # and this test is faster, so the second driver has a folder of its own.
    folder = tmp_path / "second"
    folder.mkdir()
    again = WandbTracker(folder)
    again.start(STUDY, {})
    for progress in progress_of(record, 5, 10, 15, 20):
        again.log_progress(progress)
    again.log_record(record)
    again.log_record(stopped)
    assert again.view == f"wandb sync {folder}/wandb/offline-run-*"
    points, run = wandb_rows(folder, identity)
    same(points, expected(record, record.curve))
    assert run["exit_code"] == 0
    assert run["summary"]["state"] == '"finished"'
    same(wandb_rows(folder, run_id(STUDY.name, stopped.fingerprint))[0], expected(stopped, stopped.curve))

    def run_folders() -> list[Path]:
        return list(folder.glob("wandb/offline-run-*"))

    count = len(run_folders())
    later = WandbTracker(folder)
    later.start(STUDY, {})
    later.log_record(record)
    assert len(run_folders()) == count, "a logged record is logged again"
    secret = [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]
    assert not secret


def test_tensorboard_has_one_folder_a_lane_without_duplicate_steps(tmp_path, make_record):
    record = make_record(steps=20)
    folder = tmp_path / "tensorboard" / f"lora-lr0.001-seed0-{record.fingerprint[:12]}"
    for steps in ((5, 10), (5, 10, 15)):  # the second driver gets all reports again
        tracker = TensorBoardTracker(tmp_path)
        tracker.start(STUDY, {})
        for progress in [*progress_of(record, *steps), *progress_of(record, *steps)]:
            tracker.log_progress(progress)
        points, _ = tensorboard_points(folder)
        assert [step for step, _ in points["train_loss"]] == list(range(1, steps[-1] + 1))
        assert points["validation_exact_match"] == [(s, s / 40) for s in steps]
    tracker.log_record(record)
    points, others = tensorboard_points(folder)
    assert "record/text_summary" in others
    same(points, expected(record, record.curve))


def test_a_long_curve_is_thinned_the_same_way_during_the_training_and_from_the_record(make_record):
    record = make_record(steps=1000)
    shown = run_values.select_live_steps(record.curve, 1000, {5, 999})
    assert [each.step for each in shown] == sorted({*range(20, 1001, 20), 5, 999})
    assert run_values.select_live_steps(record.curve[:10], 10, {5}) == list(record.curve[:10])


class Faulty(Tracker):
    """A tracker that raises an error for every record, and waits for `is_closing` when it is opened."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.is_closing = threading.Event()
        self.calls: list[str] = []

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        self.is_closing.wait()

    def log_record(self, record: Record) -> None:
        self.calls.append("log_record")
        raise self.error

    def finish(self, end: StudyEnd) -> None:
        self.calls.append("finish")
        raise self.error


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (OSError(f"down {KEY}"), ["log_record"]),
        (RuntimeError(f"no {KEY}"), ["log_record", "finish"]),
    ],
)
def test_a_faulty_tracker_is_not_called_again_at_the_end_and_says_why(store, make_record, error, calls):
    record, tracker = make_record(), Faulty(error)
    store.put(record)
    writer = TrackerWriter(lambda: tracker, store, STUDY, {})
    writer.put(record.fingerprint)
    writer.begin_close(StudyEnd(), 240)
    tracker.is_closing.set()
    writer.wait_closed()
    assert writer.pending_count == 1
    assert tracker.calls == calls
    assert not writer.is_finished
    assert writer.error
    assert KEY not in writer.error
    assert store.get(record.fingerprint) is not None


class Interrupted(Tracker):
    """A tracker that does not answer when something is logged for the first time."""

    def __init__(self) -> None:
        self.logged = Queue[Any]()
        self.refused: set[Any] = set()

    def _log(self, what: Any) -> None:
        if what not in self.refused:
            self.refused.add(what)
            raise OSError("down")
        self.logged.put(what)

    def log_progress(self, progress: LaneProgress) -> None:
        self._log(progress.step)

    def log_record(self, record: Record) -> None:
        self._log(record.state)


def test_what_an_outage_interrupts_is_logged_after_it(store, make_record, monkeypatch):
    monkeypatch.setattr(timeouts, "TRACKER_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(timeouts, "TRACKER_PROGRESS_DELAY_SECONDS", 0.0)
    record, tracker = make_record(), Interrupted()
    store.put(record)
    writer = TrackerWriter(lambda: tracker, store, STUDY, {})
    for progress in progress_of(record, 5, 10):
        writer.put_progress(progress)
    assert [tracker.logged.get(timeout=60) for _ in range(3)] == [0, 5, 10]
    writer.put(record.fingerprint)
    assert tracker.logged.get(timeout=60) == "finished"
    writer.begin_close(StudyEnd(), 240)
    writer.wait_closed()
    assert writer.pending_count == 0
    assert writer.is_finished
    assert tracker.logged.empty()


def test_a_server_of_wandb_that_is_down_delays_nothing(store, make_record, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(timeouts, "TRACKER_ANSWER_SECONDS", 1.0)
    record = make_record()
    store.put(record)
    WandbTracker.check()
    writer = TrackerWriter(lambda: WandbTracker(tmp_path), store, STUDY, {})
    writer.put(record.fingerprint)
    writer.begin_close(StudyEnd(), 240)
    writer.wait_closed()
    assert writer.pending_count == 1
    assert "Failed to get resume status" in writer.error
    assert "\n" not in writer.error


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ("wandb", "no API key here; set WANDB_API_KEY"),
        ("tensorboard", r"pip install 'tensorboard<\S+'$"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused_in_one_line(monkeypatch, tmp_path, chosen, line):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if chosen == "tensorboard":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=line):
        TRACKERS[chosen].check()


def unreadable_list(folder: Path) -> None:
    (folder / "tensorboard" / "logged-records.txt").mkdir(parents=True)


def file_as_folder(folder: Path) -> None:
    (folder / "tensorboard").touch()


@pytest.mark.parametrize(
    ("prepare", "path"),
    [(unreadable_list, "tensorboard/logged-records.txt"), (file_as_folder, "tensorboard/")],
)
def test_a_tracker_whose_files_cannot_be_used_says_so_at_once_and_does_not_end_the_study(
    store, make_record, tmp_path, prepare, path
):
    record = make_record()
    store.put(record)
    prepare(tmp_path)
    study = SimpleNamespace(
        file=STUDY,
        tracking_uri=empty_database(tmp_path / "mlflow.db"),
        store=store,
        folder=tmp_path,
        trackers={"tensorboard": TensorBoardTracker},
    )
    printed = Queue[str]()
    with Progress(tmp_path, 1, 0, Console(file=StringIO())) as progress:

        def notify(line: str) -> None:
            progress.notify(line)
            printed.put(line)

        writers = start_writers(study, notify)
        writers.put(record.fingerprint)
        line = printed.get(timeout=60)  # the study has not ended
    assert line.startswith("--tracker tensorboard: ")
    assert path in line
    assert line in (tmp_path / "study.log").read_text()
    writers.close(StudyEnd(), 240)
    writer = writers["tensorboard"]
    assert (writer.pending_count, writers["mlflow"].pending_count) == (1, 0)
    assert path in writer.error
    assert printed.empty(), "the line is printed once"
