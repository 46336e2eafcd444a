"""Search for the secrets in the environment and the options of a real study, during and after the study.

The tests search files, logs, MLflow's fields, output and command lines, and show that the search works.
"""

from __future__ import annotations

import base64
import gzip
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from events import until
from planted import forms, found, planted
from talkative_task import SECRETS

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

ROOT = Path(__file__).parents[2]
TASK = Path(__file__).with_name("talkative_task.py")
LOOK_SECONDS = 0.05
LIMIT_SECONDS = 600.0
URI, DATABASE = "the password in --tracking-uri", "the password in an error's text"


@dataclass
class Watch:
    """Thread that reads the command lines of all processes of this machine repeatedly."""

    values: Mapping[str, str]
    home: Path = Path("/nowhere")
    """HOME of the watched processes."""
    course: dict[str, list[tuple[bool, bool]]] = field(default_factory=dict)
    """Readings of each typed command: whether it showed a secret, and whether it had child processes."""
    others: set[str] = field(default_factory=set)
    """Names of secrets found in other command lines, with the command lines."""
    looked_at: set[str] = field(default_factory=set)
    """The `WORDS` that command lines of processes with this HOME contain."""
    typed: dict[int, str] = field(default_factory=dict)
    """Name of each typed command by its process id, until `wait` has seen its end."""
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Lock that is held during a reading, and while `typed` changes."""

    def __enter__(self) -> Watch:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as a user types it, after a first reading of its command line."""
        held = ["sh", "-c", 'read -r _; exec "$@"', "sh", *command]
        with self.busy:
            process = subprocess.Popen(held, stdin=subprocess.PIPE, **options)
            self.typed[process.pid], self.course[name] = name, []
            while not self.course[name]:
                self.look()
        assert process.stdin is not None
        process.stdin.close()
        return process

    @staticmethod
    def has_ended(process: subprocess.Popen[bytes]) -> bool:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for a typed command. Returns its exit code."""
        until(lambda: self.has_ended(process), seconds=LIMIT_SECONDS)
        with self.busy:
            del self.typed[process.pid]  # another process may get the id from now on
        return process.wait()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with self.busy:
                self.look()

    def look(self) -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended
                self._look_at(folder)

    def _look_at(self, folder: Path) -> None:
        line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        seen = {name for name, value in self.values.items() if value in line}
        if line and (name := self.typed.get(int(folder.name))):
            children = (folder / "task" / folder.name / "children").read_text()
            self.course[name].append((bool(seen), bool(children)))
            return
        self.others |= {f"{name}: {line}" for name in seen}
        if words := {word for word in WORDS if word in line}:
            variables = (folder / "environ").read_bytes().split(b"\0")
            self.looked_at |= words if f"HOME={self.home}".encode() in variables else set()


WORDS = ("gcs_server", "raylet/raylet", "setup_worker.py", "ray::")


# -- the study


@dataclass(frozen=True)
class Study:
    values: dict[str, str]
    folders: tuple[Path, ...]
    output: Path
    said: dict[str, str]
    codes: dict[str, int]
    runs: int
    """Number of runs in MLflow."""
    mlflow: str
    """Text of all runs and experiments that MLflow's client returns."""
    watch: Watch


@pytest.fixture(scope="module")
def study(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Run a study in which one configuration fails, and related commands, with planted secrets."""
    from mlflow_server import Server

    root = tmp_path_factory.mktemp("secrets")
    output, said_in, go = root / "results", root / "said", root / "go"
    for folder in (said_in, root / "server", root / "home"):
        folder.mkdir()
    values = planted(*SECRETS, URI, DATABASE)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {name: values[name] for name in SECRETS}
    environment |= {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_USERNAME": "me", "HOME": str(root / "home")}
    environment["TEST_SERVER"] = f"postgresql://me:{values[DATABASE]}@db.example/mlflow"
    environment |= {"TEST_GO": str(go), "COLUMNS": "80"}
    server = Server(root / "server")
    uri = server.uri.replace("://", f"://me:{values[URI]}@")
    options = ["--dry-run", "--task", str(TASK), "--model", str(shared / "model"), "--variants", "lora"]
    options += ["--seeds", "1", "--trainers", "1", "--learning-rates", "3e-3", "2e-2"]
    options += ["--output", str(output), "--study", "s"]
    options += ["--tracking-uri", uri]
    script, module = str(ROOT / "experiments/lr_sensitivity.py"), ("-m", "orchestrator")
    codes: dict[str, int] = {}
    before = set(rays())

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with (said_in / name).open("wb") as file:
            words = [sys.executable, *command]
            return watch.start(name, words, stdout=file, stderr=file, env=environment, cwd=ROOT)

    def end(**processes: subprocess.Popen[bytes]) -> None:
        codes.update({name: watch.wait(process) for name, process in processes.items()})

    def is_in_the_middle(process: subprocess.Popen[bytes]) -> bool:
        seen = watch.looked_at == set(WORDS) and watch.course["study"][-1] == (False, True)
        return seen or watch.has_ended(process)

    try:
        with Watch(values, root / "home") as watch:
            server.start()
            process = start("study", script, *options)  # the study's lanes wait for `go`
            until(lambda: is_in_the_middle(process), (said_in / "study").read_text, LIMIT_SECONDS)
            go.touch()
            end(study=process)
            store = Store(output / "store")
            sync = [*module, "sync", "--output", str(output), "--tracking-uri", uri]
            end(
                plan=start("plan", script, *options, "--plan"),
                check=start("check", *module, "check", *options),
                show=start("show", *module, "show", *store.states(), "--output", str(output)),
                report=start("report", *module, "report", "s", "--output", str(output)),
                sync=start("sync", *sync),
            )
            runs, told = mlflow_tells(server.uri)
            server.kill()
            end(down=start("down", *sync))
    finally:
        server.kill()
    said = {path.name: path.read_text() for path in said_in.iterdir()}
    folders = (root, *(set(rays()) - before), Path(tempfile.gettempdir(), f"lora-orchestrator-{os.getuid()}"))
    return Study(values, folders, output, said, codes, runs, told, watch)


def rays() -> list[Path]:
    """Return the folders of all Ray sessions on this machine, including other users' sessions."""
    return [p for p in Path(tempfile.gettempdir(), "ray").glob("session_2*") if p.is_dir()]


def mlflow_tells(uri: str) -> tuple[int, str]:
    """Return the number of runs, and the text of all runs and experiments that the client returns."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    experiments = client.search_experiments()
    runs = client.search_runs([each.experiment_id for each in experiments])
    told = [each.to_dictionary() for each in runs], [dict(each) for each in experiments]
    return len(runs), repr(told)


# -- results of the search, and tests of the search


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_the_study_was_real_and_its_user_code_printed_the_secrets(study: Study) -> None:
    codes = {"plan": 0, "study": 1, "check": 0, "show": 0, "report": 0, "sync": 0, "down": 2}
    assert study.codes == codes, study.said
    assert study.runs == 3, "the study's and one a configuration"
    records = {record.state: record for record in Store(study.output / "store").records()}
    assert set(records) == {"finished", "failed"}
    failed: Record = records["failed"]
    secretless = " ".join(f"{name}=***" for name in SECRETS)
    words = f"cannot reach postgresql://me:***@db.example/mlflow with {secretless}"
    assert failed.reason == f"ConnectionError: {words}"
    assert words in failed.traceback
    assert f'File "{TASK}"' in failed.traceback, "it still says where"
    assert words in study.said["show"]
    assert words in study.mlflow
    assert "1 configurations failed" in study.said["study"]
    assert "http://me:***@127.0.0.1" in study.said["down"]


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_no_file_has_a_secret(study: Study) -> None:
    logs = {path.name for folder in study.folders for path in folder.rglob("logs/*")}
    assert {"gcs_server.out", "raylet.out", "runtime_env_agent.log"} <= logs, "Ray's session was searched"
    assert found(study.values, *study.folders) == []


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_no_output_and_no_mlflow_field_has_a_secret(study: Study) -> None:
    for name, text in {**study.said, "MLflow": study.mlflow}.items():
        assert [name for name, form in forms(study.values) if form.decode() in text] == [], name


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_no_command_line_has_a_secret(study: Study) -> None:
    assert study.watch.looked_at == set(WORDS)
    assert study.watch.others == set()
    # A typed secret is visible until the program has read and hidden it, before the program starts a process.
    assert set(study.watch.course) == set(study.codes)
    for looks in study.watch.course.values():
        seen = [one for one, _ in looks]
        assert seen == sorted(seen, reverse=True), "what was hidden stays hidden"
        assert not any(one and children for one, children in looks)
    assert (False, True) in study.watch.course["study"]


def test_the_search_finds_planted_secrets(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    value = planted("x")
    text = value["x"]
    (tmp_path / "plain.log").write_text(f"and {text}.")
    (tmp_path / "basic.log").write_bytes(base64.b64encode(f"me:{text}".encode()))
    (tmp_path / "old.log.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", text)
    column = [f"{text[:20]}{i}" for i in range(1000)] + [text]
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet", compression="zstd")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("create table a (b)")
        database.execute("insert into a values (?)", ("-" * 4060 + text + "-" * 9000,))
        database.commit()
    names = ["a.db", "a.parquet", "a.zip", "basic.log", "old.log.gz", "plain.log"]
    assert [hit.rpartition("/")[2] for hit in found(value, tmp_path)] == names
    (tmp_path / "innocent.log").write_text("pl4nted")
    assert len(found(value, tmp_path)) == len(names)


def test_the_watch_finds_a_secret_in_a_command_line() -> None:
    value = planted("x")
    with Watch(value) as watch:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", value["x"]])
        until(lambda: watch.others)
        process.kill()
        process.wait()
    assert [line.partition(":")[0] for line in watch.others] == ["x"]
