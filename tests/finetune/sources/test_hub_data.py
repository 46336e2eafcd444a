"""Tables of the hub's datasets: local folders, malformed files, and a hub that cannot be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.sources.hub_data import Table
from orchestrator.util.errors import UsageError

ORGANISATION = "org"
COLUMNS: dict[str, Any] = {"text": str, "label": range(2)}
GOOD = {"text": ["a", "b"], "label": [0, 1]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data"


def write_table(folder: Path, files: dict[str, Any], **more: Any) -> Table:
    """Return a table of a dataset with these files, given as text, bytes, or columns of a Parquet file."""
    dataset_folder = folder / ORGANISATION / "set"
    dataset_folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, dict):
            parquet.write_table(pa.table(content), dataset_folder / name)
        else:
            (dataset_folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table(f"{ORGANISATION}/set", "train", COLUMNS, **more)


def error_message(table: Table) -> str:
    with pytest.raises(UsageError) as caught:
        hub_data.load_table(table, "mine")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith("Task 'mine': ")
    return message.removeprefix("Task 'mine': ")


def test_a_table_is_read_with_the_requested_columns_only(folder: Path) -> None:
    files = {"train-0.parquet": {**GOOD, "more": [1, 2]}, "train-1.parquet": {**GOOD, "more": [1, 2]}}
    read = hub_data.load_table(write_table(folder, files), "mine")
    assert read[:] == {"text": ["a", "b"] * 2, "label": [0, 1] * 2}


CLASS = "'label' must be a class from 0 to 1, it is"
BAD_SECOND_FILE = {
    "null": ({"text": ["a", None], "label": [0, 1]}, ": row 4: 'text' must be text, it is null"),
    "null label": ({"text": ["a", "b"], "label": [0, None]}, f": row 4: {CLASS} null"),
    "out of range": ({"text": ["a", "b"], "label": [-1, 1]}, f": row 3: {CLASS} -1"),
    "another column": ({"text": ["a"], "labels": [0]}, "because column names don't match"),
    "another type": ({"text": ["a"], "label": ["no"]}, "parse string: 'no' as a scalar of type int64"),
    "junk": (b"junk" * 100, "Parquet magic bytes not found in footer"),
    "nothing": (b"", "Parquet file size is 0 bytes"),
}


@pytest.mark.parametrize("case", BAD_SECOND_FILE)
def test_a_malformed_parquet_file_among_several_is_refused(folder: Path, case: str) -> None:
    content, expected = BAD_SECOND_FILE[case]
    message = error_message(write_table(folder, {"train-0.parquet": GOOD, "train-1.parquet": content}))
    assert message.startswith(f"org/set (train) in {folder / ORGANISATION / 'set'}")
    assert expected in message


# -- an unreachable hub --------------------------------------------------------------------------------------

READ_SCRIPT = """
import json, sys, time
waits = []
time.sleep = waits.append
from orchestrator.finetune.sources.hub_data import Table, load_table
from orchestrator.util.errors import UsageError
import datasets
for name in sys.argv[1:]:
    for revision in (None, "a" * 40):
        try:
            columns = {"text": object, "label": object}
            found = load_table(Table(name, "train", columns, revision=revision), "mine")[:]
        except UsageError as error:
            found = str(error)
        print(json.dumps([found, waits]))
"""


def read_in_subprocess(home: Path, endpoint: str, *names: str) -> list[Any]:
    """Read datasets in another process, each without and with a given commit, and return the results.

    Also assert that no attempt waits and tries again; `datasets` itself would do so.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ORCHESTRATOR_"))}
    done = subprocess.run(
        [sys.executable, "-c", READ_SCRIPT, *names],
        env={**environment, "HF_HOME": str(home), "HF_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(names)
    assert all(waits == [] for _, waits in found)
    return [result for result, _ in found]


def test_without_a_hub_a_cached_dataset_is_read_or_the_error_says_what_to_set(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "datasets--org--set"
    snapshot = cache / "snapshots" / ("a" * 40)  # as written by `hf download`
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    parquet.write_table(pa.table(GOOD), snapshot / "train.parquet")
    *cached, newest, pinned = read_in_subprocess(tmp_path, "http://127.0.0.1:1", "org/set", "org/none")
    assert cached == [GOOD, GOOD]
    assert newest == pinned
    assert newest.startswith("Task 'mine': org/none cannot be read from the data hub (ConnectError).")
    assert all(name in newest for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "ORCHESTRATOR_DATA"))


@contextmanager
def hub() -> Iterator[str]:
    """Serve gated datasets like the hub.

    Every client gets the commit of org/set. For org/moving, each request for the newest commit gets a new
    commit.
    """
    newest = iter("123456789")

    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files = {"siblings": [{"rfilename": "train.parquet"}]}
            dataset_path, _, commit = self.path.partition("?")[0].partition("/revision/")
            is_moving = dataset_path == "/api/datasets/org/moving"
            is_known = is_moving or dataset_path.startswith("/api/datasets/org/set")
            sha = commit or next(newest) * 40 if is_moving else "a" * 40
            message = {"id": "org/set", "sha": sha, "gated": "auto", **files} if is_known else {"error": "no"}
            body = json.dumps(message).encode()
            self.send_response(200 if is_known else 403)
            self.send_header("X-Error-Code", "" if is_known else "GatedRepo")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815 (names of http.server)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


PIN_SCRIPT = """
import json, sys
from pathlib import Path
from orchestrator.finetune.resolve.option_names import resolve_tasks
from orchestrator.finetune.sources import hub_data
from orchestrator.study.options import StudyOptions
of = hub_data.Table("org/moving", "train", {"text": str})
bases = Path(sys.argv[1])
resolve_tasks(StudyOptions(task=("letters",), variants=("lora",)), bases, add_pins=False)
found = [hub_data._resolve_source(of, "mine")[1], bases.exists()]
hub_data.set_pin_folder(bases)
found += [hub_data._resolve_source(of, "mine")[1] for _ in range(2)]
hub_data.set_pin_folder(bases, add_pins=False)
found.append(hub_data._resolve_source(of, "mine")[1])
print(json.dumps(found))
"""


def test_a_commit_is_pinned_in_the_store_and_read_by_processes_that_add_no_pins(tmp_path: Path) -> None:
    """The hub has a new commit at each request for the newest commit."""
    with hub() as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", PIN_SCRIPT, str(tmp_path / "bases")],
            env={**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["1" * 40, False, "2" * 40, "2" * 40, "2" * 40]


def test_the_error_for_a_gated_dataset_names_the_token(tmp_path: Path) -> None:
    names = ("org/set", "org/hidden")
    with hub() as endpoint:
        found = read_in_subprocess(tmp_path, endpoint, *names)
    for name, message in zip((n for n in names for _ in range(2)), found, strict=True):
        assert message.startswith(f"Task 'mine': {name} cannot be read from the data hub")
        assert "HF_TOKEN" in message
        assert "\n" not in message
