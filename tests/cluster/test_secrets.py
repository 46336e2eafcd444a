"""Secrets that are planted in a real study's environment, and in what is typed, are found nowhere afterwards:
in no file, log, MLflow field, output or command line. The search itself is shown to find what is there."""

from __future__ import annotations

import base64
import gzip
import os
import re
import secrets
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from events import until
from talkative_task import SECRETS

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

ROOT = Path(__file__).parents[2]
TASK = Path(__file__).with_name("talkative_task.py")
LOOK_SECONDS = 0.05
LIMIT_SECONDS = 600.0
URI, DATABASE = "the password in --tracking-uri", "the password in an error's text"


def planted(*names: str) -> dict[str, str]:
    return {name: f"pl4nted{secrets.token_hex(16)}" for name in names}


# -- the search


def forms(values: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """What to look for: each value as it is, and as HTTP's basic authentication sends it."""
    for name, value in values.items():
        yield name, value.encode()
        yield name, base64.b64encode(f"me:{value}".encode())


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is packed in them: a database's long values lie in pieces, columns of Parquet
    are compressed."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    elif raw.startswith(b"PAR1"):
        from pyarrow import parquet

        yield repr(parquet.read_table(path).to_pylist()).encode()
    elif raw.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(path)) as database:
            yield "\n".join(database.iterdump()).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def found(values: Mapping[str, str], *folders: Path) -> list[str]:
    """Which value is in which file."""
    hits = []
    for path in (p for folder in folders for p in folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # another's of this machine, which has just gone
            for name in {name for data in contents(path) for name, form in forms(values) if form in data}:
                hits.append(f"{name}: {path}")
    return sorted(hits)


@dataclass
class Watch:
    """Reads the command lines of all processes of this machine, again and again."""

    values: Mapping[str, str]
    home: Path = Path("/nowhere")
    """HOME of the processes in question."""
    course: dict[str, list[tuple[bool, bool]]] = field(default_factory=dict)
    """Of each command that somebody typed, look by look: whether a secret was in it, and whether it had
    children."""
    others: set[str] = field(default_factory=set)
    """Names of secrets in other command lines, with these."""
    looked_at: set[str] = field(default_factory=set)
    """Words of command lines of processes with this home."""
    typed: dict[int, str] = field(default_factory=dict)
    """The commands that somebody typed, by process, until they have been waited for."""
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held during a look, and while `typed` is not up to date."""

    def __enter__(self) -> Watch:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start what somebody types. However busy this machine is, it begins after the first look at it."""
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
        """Return its exit code."""
        until(lambda: self.has_ended(process), seconds=LIMIT_SECONDS)
        with self.busy:
            del self.typed[process.pid]  # from now on it may be another's
        return process.wait()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with self.busy:
                self.look()

    def look(self) -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
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
    """How many MLflow has."""
    mlflow: str
    """All that its client tells of the study's runs."""
    watch: Watch


@pytest.fixture(scope="module")
def study(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of which one configuration fails, and the commands around it, with planted secrets."""
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
    options += ["--seeds", "1", "--learning-rates", "3e-3", "2e-2", "--output", str(output), "--study", "s"]
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
            process = start("study", script, *options)  # its lanes wait for `go`
            until(lambda: is_in_the_middle(process), (said_in / "study").read_text, LIMIT_SECONDS)
            go.touch()
            end(study=process)
            store = Store(output / "store")
            sync = [*module, "sync", "--output", str(output), "--tracking-uri", uri]
            end(
                plan=start("plan", script, *options, "--plan"),
                check=start("check", *module, "check", *options, "--no-probe"),
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
    """Folders of this machine's Rays, those of others, too."""
    return [p for p in Path(tempfile.gettempdir(), "ray").glob("session_2*") if p.is_dir()]


def mlflow_tells(uri: str) -> tuple[int, str]:
    """Return how many runs there are, and all that the client tells of them."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    experiments = client.search_experiments()
    runs = client.search_runs([each.experiment_id for each in experiments])
    told = [each.to_dictionary() for each in runs], [dict(each) for each in experiments]
    return len(runs), repr(told)


# -- what is not found, and that the search finds


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_the_study_was_a_real_one_and_its_user_code_said_the_secrets(study: Study) -> None:
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
def test_they_are_in_no_file(study: Study) -> None:
    logs = {path.name for folder in study.folders for path in folder.rglob("logs/*")}
    assert {"gcs_server.out", "raylet.out", "runtime_env_agent.log"} <= logs, "Ray's session was searched"
    assert found(study.values, *study.folders) == []


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_they_are_in_nothing_that_is_said_or_that_mlflow_tells(study: Study) -> None:
    for name, text in {**study.said, "MLflow": study.mlflow}.items():
        assert [name for name, form in forms(study.values) if form.decode() in text] == [], name


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_they_are_in_no_command_line(study: Study) -> None:
    assert study.watch.looked_at == set(WORDS)
    assert study.watch.others == set()
    # What somebody types is there until the program has come to read it. That is before it does anything.
    assert set(study.watch.course) == set(study.codes)
    for looks in study.watch.course.values():
        seen = [one for one, _ in looks]
        assert seen == sorted(seen, reverse=True), "what was hidden stays hidden"
        assert not any(one and children for one, children in looks)
    assert (False, True) in study.watch.course["study"]


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
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


def test_the_watch_sees_a_command_line() -> None:
    value = planted("x")
    with Watch(value) as watch:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", value["x"]])
        until(lambda: watch.others)
        process.kill()
        process.wait()
    assert [line.partition(":")[0] for line in watch.others] == ["x"]


# -- how it is done


def run_main(body: str, *arguments: str, **environment: str) -> tuple[str, str, list[str]]:
    """Output, errors, and the command line that the program finds itself to have."""
    program = "from pathlib import Path\nfrom orchestrator.study.command import main\n"
    program += "def run():\n    print(Path('/proc/self/cmdline').read_bytes())\n"
    program += f"    {body}\nmain(run)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=240,
    )
    return done.stdout, done.stderr, done.stdout.split("\\x00")[3:-1]


def test_a_command_line_loses_its_passwords_and_nothing_else() -> None:
    uri = "--tracking-uri=postgresql://me:pässwörd@host/db?password=abc"
    _, _, words = run_main("pass", "--a", uri, "tokentoken", "", "z", SOME_TOKEN="tokentoken")
    hidden = f"--tracking-uri=postgresql://me:{'*' * 10}@host/db?password=***"
    assert words == ["--a", hidden, "*" * 10, "", "z"]
    assert run_main("pass", "--a", "b")[2] == ["--a", "b"]


@pytest.mark.cluster
def test_ray_keeps_the_command_without_them() -> None:
    body = "from ray._private.utils import get_entrypoint_name as n; print(n())"
    said, _, _ = run_main(body, "--tracking-uri", "http://me:pl4nted@host")
    assert said.endswith("--tracking-uri http://me:*******@host\n")


def test_a_bug_shows_itself_without_them() -> None:
    value = planted("x")["x"]
    _, error, _ = run_main(f"raise OSError('no postgresql://me:{value}@h and {value}')", DB_PASSWORD=value)
    # Where it is in the program's own text is nobody's secret: that is `python -c`, which shows no lines.
    assert error.startswith("Traceback")
    assert error.endswith("OSError: no postgresql://me:***@h and ***\n")
    assert value not in error


def test_an_error_that_leaves_a_worker_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.finetune.faults import SeatBroken
    from orchestrator.schedule.seat_end import reason
    from orchestrator.study.secrets import errors_without_secrets

    value = planted("x")["x"]
    monkeypatch.setenv("HF_TOKEN", value)
    down = OSError("the hub is down")
    down.__cause__ = KeyError(value)
    with pytest.raises(RuntimeError) as caught, errors_without_secrets(SeatBroken):
        raise down
    assert value not in str(caught.value)
    assert "KeyError: '***'" in str(caught.value)
    assert reason(caught.value) == "OSError: the hub is down"
    with pytest.raises(SeatBroken, match=r"^with \*\*\*$"), errors_without_secrets(SeatBroken):
        raise SeatBroken(f"with {value}")
    with pytest.raises(LookupError), errors_without_secrets(SeatBroken):
        raise LookupError("nothing to hide")
    assert reason(OSError(f"a\n{value}")) == "***"


def test_everyday_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.study.secrets import without_secrets

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "everyday word")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    monkeypatch.setenv("SHORT_TOKEN", "lora")
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghij")
    text = "everyday word /home/me/.ray/auth_token lora"
    assert without_secrets(text) == text
    assert without_secrets("abcdefghij abcdefgh") == "*** ***"


# -- what `ray up` makes of cluster.yaml


def strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (text for pair in node.items() for part in pair for text in strings(part))
    elif isinstance(node, Sequence):
        yield from (text for part in node for text in strings(part))


def test_no_command_of_the_description_has_a_secret_for_a_word() -> None:
    """Bash would put a variable's value in place of its name where that stands in no single quotes."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    commands = [text for key, value in config.items() if key.endswith("_commands") for text in strings(value)]
    assert len(commands) > 15
    for text in strings(config):
        bare = re.sub(r"'[^']*'", "", text)
        assert not re.search(r"(?i)\$\{?\w*(token|secret|password|key)", bare), text
        assert not re.search(r"(?i)\bhf_\w{10}|AKIA[0-9A-Z]{12}|://[^/@:\s]+:[^@\s]+@", text), text
    assert any("${HF_TOKEN" in text for text in commands), "this would see one"


def test_what_every_shell_of_a_node_reads_says_where_the_token_is_and_not_what(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    value = planted("x")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "HF_TOKEN": value["x"]}
    for command in (c for c in config["setup_commands"] if "lora_env" in c and "storage.sh" not in c):
        subprocess.run(["bash", "-c", command], check=True, env=environment)
    assert found(value, tmp_path) == []
    shell = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; printenv HF_TOKEN; set | grep -c ^hub_token"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert shell.stdout.split() == [value["x"], "0"]
    assert (tmp_path / ".lora_env").read_text().count("HF_TOKEN") == 2


@pytest.mark.cluster
def test_what_ray_up_derives_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import moto
    from ray.autoscaler._private import commands
    from stack import deploy

    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
    values = planted(*names, "the token's file")
    for name in names:
        monkeypatch.setenv(name, values[name])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAnobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for folder in ("tmp", "home/.ray", "head"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(values["the token's file"])
    with moto.mock_aws():
        deploy(boto3.client)
        config = commands._bootstrap_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    cached = list((tmp_path / "tmp").glob("ray-config-*"))
    assert len(cached) == 1, "Ray keeps the description that it has made of ours"
    (key,) = (tmp_path / "home/.ssh").glob("*.pem")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    values["the key pair's private half"] = key.read_text().splitlines()[1]
    (tmp_path / "head/ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))  # as Ray sends it there
    hits = found(values, tmp_path)
    assert [hit.partition(":")[0] for hit in hits] == ["the key pair's private half", "the token's file"]
    assert {Path(hit.partition(": ")[2]) for hit in hits} == {key, tmp_path / "home/.ray/auth_token"}
