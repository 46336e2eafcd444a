"""Promise 12: a study listens on loopback only, leaks no secret, keeps its token private, runs no pickle.

One study serves most tests. It runs in a new home folder, with secrets in its environment and a password on
its command line. Its lanes wait during training while the fixture inspects the study's processes. One lane
then fails with an error that quotes the secrets, as errors of database drivers do.
"""

from __future__ import annotations

import base64
import os
import pickle
import secrets
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import as_a_user
import psutil
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from tracking_server import served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

TASK = Path(__file__).with_name("waiting_task.py")
STUDY = "secrets"
WORDS = ["study", "--dry-run", "--task", TASK, "--variants", "lora", "--learning-rates", "1e-2", "2e-2"]
WORDS += ["--seeds", "1", "--widen", "0", "--study", STUDY]
NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
MARK = "pl4nted"


@dataclass
class Seen:
    """Observations of a study.

    Args:
        home: The working folder of the commands, which is also the user's home folder.
        temporary: The folder of temporary files, with Ray's session and its logs.
        variables: The environment variables of the commands.
        planted: Name -> secret.
        addresses: The addresses on which the study's processes listened.
        processes: The names of the study's processes.
        leaks: Command lines with a secret, except that of the study's command.
        own_line: Whether the command line of the study's command showed a secret while its lanes trained.
        token_mode: The permission bits of the file with Ray's token.
        ended: The result of the study's command.
        tracked: All runs of the study on MLflow's server, as text.
    """

    home: Path
    temporary: Path
    variables: dict[str, str]
    planted: dict[str, str]
    addresses: set[str] = field(default_factory=set)
    processes: set[str] = field(default_factory=set)
    leaks: set[str] = field(default_factory=set)
    own_line: bool = True
    token_mode: int = 0
    ended: as_a_user.Result = field(default_factory=lambda: as_a_user.Result(-1, "", ""))
    tracked: str = ""

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"


def look_at_command_lines(seen: Seen, typed: int) -> None:
    """Add command lines with a secret to `leaks`; for the process `typed`, set `own_line` instead."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            line = (folder / "cmdline").read_text(errors="replace")
            if any(value in line for value in seen.planted.values()):
                if int(folder.name) == typed:
                    seen.own_line = True
                else:
                    seen.leaks.add(line)
            elif int(folder.name) == typed:
                seen.own_line = False


def look_at_processes(seen: Seen, driver: psutil.Process) -> None:
    """Add the names of the study's processes, and the addresses on which they listen."""
    for process in (driver, *driver.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            seen.processes.add(process.name())
            sockets = process.net_connections("tcp")
            seen.addresses |= {s.laddr.ip.removeprefix("::ffff:") for s in sockets if s.status == "LISTEN"}


@pytest.fixture(scope="module")
def seen(with_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    root = tmp_path_factory.mktemp("security")
    home, here, go = root / "home", root / "here", root / "go"
    shutil.copytree(with_base, home)
    here.mkdir()
    temporary = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))  # short, for the names of Ray's sockets
    planted = {name: MARK + secrets.token_hex(16) for name in (*NAMES, "URI")}
    variables = {name: planted[name] for name in NAMES}
    variables |= {"HOME": str(home), "TMPDIR": str(temporary), "MLFLOW_TRACKING_USERNAME": "me"}
    variables |= {"WAITS_BEFORE": "4", "WAITS_FOR": str(go), "QUOTES": " ".join(NAMES)}
    found = Seen(home, temporary, variables, planted)
    umask = os.umask(0o022)  # lets everybody read new files
    try:
        with served(f"sqlite:///{root}/server.db", root / "server") as server:
            uri = server.uri.replace("://", f"://me:{planted['URI']}@")
            process = as_a_user.start(*WORDS, "--tracking-uri", uri, cwd=home, **variables)

            def is_in_the_middle() -> bool:
                look_at_command_lines(found, process.pid)
                return bool(server.experiments().get(STUDY)) and len(server.runs(STUDY)) == 3

            try:
                as_a_user.wait_until(is_in_the_middle, process)
                look_at_processes(found, psutil.Process(process.pid))
                found.token_mode = stat.S_IMODE(found.token.stat().st_mode)
                go.touch()
                found.ended = as_a_user.end(process)
            finally:
                process.kill()
            found.tracked = repr(server.ask("runs/search", experiment_ids=[server.experiments()[STUDY]]))
        yield found
    finally:
        os.umask(umask)
        shutil.rmtree(temporary, ignore_errors=True)


def test_the_study_was_real_and_quoted_its_secrets(seen: Seen) -> None:
    assert seen.ended.code == 1, seen.ended
    states = {record["state"]: record for record in as_a_user.records(seen.home).values()}
    assert states.keys() == {"finished", "failed"}
    for name in NAMES:
        assert f"{name}=" in states["failed"]["reason"]
        assert f"{name}=" in states["failed"]["traceback"]
        assert f"{name}=" in seen.tracked


def test_a_study_listens_on_loopback_only(seen: Seen) -> None:
    assert {"gcs_server", "raylet"} <= seen.processes
    assert seen.addresses == {"127.0.0.1"}


def test_no_command_line_has_a_secret(seen: Seen) -> None:
    assert seen.leaks == set()
    assert not seen.own_line, "the typed password is hidden while the study runs"


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes and its decoded content: databases split values, Parquet compresses columns."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"PAR1"):
        yield repr(parquet.read_table(path).to_pylist()).encode()
    elif raw.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(path)) as database:
            yield "\n".join(database.iterdump()).encode()


def test_no_file_and_no_output_has_a_secret(seen: Seen) -> None:
    values = [value.encode() for value in seen.planted.values()]
    values += [base64.b64encode(b"me:" + value) for value in values] + [seen.token.read_bytes()]
    folders = (seen.home, seen.temporary, seen.home.parent / "server")
    files = {p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    files |= {seen.home.parent / "server.db"}
    names = {path.name for path in files}
    assert {"gcs_server.out", "report.html", "study.json", "records.parquet"} <= names, "all was searched"
    leaks = [p for p in files - {seen.token} if any(v in data for data in contents(p) for v in values)]
    assert leaks == []
    shown = as_a_user.succeed("show", *as_a_user.records(seen.home), cwd=seen.home, **seen.variables)
    for text in (seen.ended.out, seen.ended.err, seen.tracked, shown):
        assert not any(value.decode() in text for value in values)


def test_no_other_user_reads_the_token_or_writes_a_file(seen: Seen) -> None:
    assert seen.token_mode == 0o600, "a new user's token, with a umask that lets everybody read"
    assert [p for p in seen.home.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o022] == []


def test_a_token_that_everybody_may_read_is_closed_and_kept(seen: Seen, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(seen.home, home)
    token = home / ".ray" / "auth_token"
    before = token.read_text()
    token.chmod(0o644)
    process = as_a_user.start(*WORDS, "--retry-failed", cwd=home, **seen.variables | {"HOME": str(home)})
    try:
        as_a_user.wait_until(lambda: stat.S_IMODE(token.stat().st_mode) == 0o600, process)
        process.send_signal(signal.SIGINT)
        assert as_a_user.end(process).code != 0
    finally:
        process.kill()
    assert token.read_text() == before


# -- pickles ----------------------------------------------------------------------------------------------


class Planted:
    """An object whose pickle creates the folder `planted` when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


def test_the_planted_pickle_runs_code(tmp_path: Path) -> None:
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Planted()))
    code = "import pickle; pickle.load(open('bad.pkl', 'rb'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "planted").is_dir()


def is_pickle(path: Path) -> bool:
    data = path.read_bytes()
    return data[:2] in {b"\x80" + bytes([protocol]) for protocol in range(2, 6)} or data[:4] == b"PK\3\4"


def test_a_study_leaves_no_pickle(seen: Seen) -> None:
    files = [p for p in (seen.home / "results").rglob("*") if p.is_file()]
    assert [path for path in files if is_pickle(path)] == []
    assert {".json", ".safetensors", ".parquet"} <= {path.suffix for path in files}


def test_a_pickle_in_place_of_an_adapter_is_refused(seen: Seen, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(seen.home, home)
    adapters = list((home / "results" / "store" / "adapters").rglob("*.safetensors"))
    assert adapters
    for path in adapters:
        path.unlink()
        torch.save({"a": Planted()}, path)
    result = as_a_user.run("export", STUDY, cwd=home, **seen.variables)
    assert result.code != 0, result
    assert not (home / "planted").exists()


@pytest.fixture
def model(with_base: Path, tmp_path: Path) -> Path:
    """Return a copy of the dry run's base model."""
    (weights,) = (with_base / "results" / "store" / "bases").rglob("model.safetensors")
    shutil.copytree(weights.parent, tmp_path / "model")
    return tmp_path / "model"


def plan(model: Path, *words: str | Path) -> as_a_user.Result:
    words = ("study", "--plan", "--variants", "lora", "--learning-rates", "1e-2", "--model", model, *words)
    return as_a_user.run(*words, "--seeds", "1", cwd=model.parent)


def refused(result: as_a_user.Result, model: Path) -> None:
    assert result.code == 2, result
    assert result.err.startswith("error: "), result
    assert result.err.count("\n") == 1, result
    assert not (model.parent / "planted").exists()


def test_a_model_with_a_pickle_that_runs_code_is_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    good = plan(model, "--task", TASK)
    assert good.code == 0, f"a pickle that contains only tensors is read: {good}"
    torch.save({**tensors, "more": Planted()}, model / "pytorch_model.bin")
    refused(plan(model, "--task", TASK), model)


def test_data_in_a_pickle_are_refused(model: Path) -> None:
    for name in ("rows.pkl", "rows.csv"):
        path = model.parent / name
        path.write_bytes(pickle.dumps(Planted()))
        refused(plan(model, "--data", path), model)
