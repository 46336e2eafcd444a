"""What the head starts beside Ray, MLflow's server on PostgreSQL, by cluster.yaml's commands on a host of its
own: what dies is started again, nothing that was reported is missing, and nobody else reaches it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import yaml
from events import until
from lab import POSTGRESQL, ROOT, CommandError, Host, Lab, lacks_postgresql

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
COUNT = 100
HALTS = FIRST, SECOND = (30, 65)
"""Records after which the reporter waits: something is killed then."""
LIMIT_SECONDS = 600.0
HEAD, OTHER = "10.77.0.2", "10.77.0.3"
STATE = "/root/.lora-orchestrator"


@pytest.fixture(scope="module")
def lab(can_have_a_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(seen=[ROOT], shared=tmp_path_factory.mktemp("shared")) as network:
        yield network


@pytest.fixture(scope="module")
def head(lab: Lab) -> Host:
    """A head whose set-up has come to the point where its services are started, with a new PostgreSQL."""
    if reason := lacks_postgresql():
        pytest.skip(reason)
    host = lab.host("head", HEAD, empty=POSTGRESQL)
    host.has_postgresql()
    for there, here in CONFIG["file_mounts"].items():
        if not here.startswith("~"):
            source, target = ROOT / here, host.path(there.replace("~", "/root"))
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    host.installed("/root/venv")
    for command in CONFIG["setup_commands"]:
        # Not the one for AWS, which cannot be asked here, and not what installs packages.
        if "lora_env" in command and "AWS_" not in command:
            shell(host, command)
    for command in CONFIG["head_setup_commands"]:
        shell(host, command)
    return host


@pytest.fixture(scope="module")
def services(head: Host) -> Host:
    """The head with all that it starts in the end, but for Ray, with which they would end."""
    commands = [c for c in CONFIG["head_start_ray_commands"] if "orchestrator.cluster.node.supervisor" in c]
    assert len(commands) == 2
    for command in commands:
        assert " --with-ray " in command
        shell(head, command.replace(" --with-ray ", " "))
    until(
        lambda: answers(head), lambda: f"MLflow's server does not start\n{log(head, 'mlflow')}", LIMIT_SECONDS
    )
    return head


def shell(host: Host, command: str) -> str:
    """As Ray runs it there."""
    line = f"source ~/.bashrc; ({command})"
    return host.run("bash", "--login", "-c", "-i", line, timeout=LIMIT_SECONDS)


def answers(host: Host) -> bool:
    asked = "curl -s -m 60 --noproxy '*' http://127.0.0.1:5000/health"
    return host.run("sh", "-c", asked, check=False) == "OK"


def log(host: Host, name: str) -> str:
    return host.path(f"{STATE}/{name}.log").read_text()


def kill_all(host: Host, words: str) -> int:
    """kill -9 of all processes that have the words in their command lines, at once. Returns how many."""
    doomed = [pid for pid, line in host.processes().items() if re.search(words, line)]
    for pid in doomed:  # as this machine counts
        with suppress(ProcessLookupError):  # some end when the first has
            os.kill(pid, signal.SIGKILL)
    return len(doomed)


SERVER = r"mlflow server|uvicorn|multiprocessing\.spawn|multiprocessing\.resource_tracker"
DATABASE = r"^/usr/lib/postgresql/|^postgres: "
KEEPER = r"orchestrator\.cluster\.keep|database\.sh watch"


class Reporter:
    """The study's driver on the head."""

    def __init__(self, host: Host) -> None:
        self.host, self.folder = host, host.path("/root/reporter")
        self.folder.mkdir()
        shutil.copy(ROOT / "tests/cluster/reporter.py", self.folder)
        shutil.copy(ROOT / "tests/record/conftest.py", self.folder / "records.py")
        shutil.copy(ROOT / "tests/study/in_process.py", self.folder)  # which that imports
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        line = f"source ~/.bashrc; exec python ~/reporter/reporter.py {' '.join(words)}"
        return ["bash", "--login", "-c", "-i", line]

    def start(self) -> None:
        words = self.command("report", str(COUNT), *map(str, HALTS))
        with (self.folder / "said").open("wb") as output:
            self.process = self.host.start(*words, output=output)

    def go(self, halt: int) -> None:
        (self.folder / f"{halt}.go").touch()

    def until_logged(self, more_than: int) -> None:
        """Waits until MLflow has so many of the records, as long as it runs."""
        until(lambda: self.logged > more_than or self.ended(), self.said, LIMIT_SECONDS)
        assert not self.ended(), self.said()

    @property
    def logged(self) -> int:
        file = self.folder / "logged"
        return int(file.read_text() or 0) if file.exists() else 0

    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def end(self) -> str:
        until(self.ended, self.said, LIMIT_SECONDS)
        assert self.process is not None
        assert self.process.returncode == 0, self.said()
        return self.said()

    def wrong(self) -> list[str]:
        said = self.host.run(*self.command("check", str(COUNT)), timeout=LIMIT_SECONDS)
        return json.loads(said.splitlines()[-1])


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_no_other_machine_reaches_them(lab: Lab, services: Host) -> None:
    head, other = services, lab.host("other", OTHER)

    def connects(host: Host, address: str, port: int) -> bool:
        """False when it is refused; whatever else happens is an error."""
        said = host.run("bash", "-c", f"echo > /dev/tcp/{address}/{port} && echo open", check=False)
        assert said == "open\n" or "Connection refused" in said, said
        return said == "open\n"

    head.start("python", "-m", "http.server", "--bind", HEAD, "5001")
    until(lambda: connects(other, HEAD, 5001), lambda: "what listens there is reached from elsewhere")
    assert connects(other, HEAD, 22)
    for port in (5000, 5432):
        assert connects(head, "127.0.0.1", port)
        assert not connects(head, HEAD, port)
        assert not connects(other, HEAD, port)
    places = head.run("ss", "-Hltn").splitlines()
    assert {line.split()[3] for line in places if not re.search(r"127\.0\.0\.1:|\[::1\]:", line)} == {
        f"{HEAD}:22",
        f"{HEAD}:5001",
    }
    # Nor do its own users, but for the one who was asked for: there is no password to guess.
    with pytest.raises(CommandError, match="authentication failed"):
        head.run("runuser", "-u", "nobody", "--", "psql", "-h", "/var/run/postgresql", "-U", "root", "mlflow")


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_what_dies_is_started_again_and_nothing_that_was_reported_is_missing(services: Host) -> None:
    head, reporter = services, Reporter(services)
    reporter.start()
    reporter.until_logged(FIRST // 2)

    started = log(head, "mlflow").count("mlflow started")
    assert kill_all(head, SERVER) >= 3, "the server and its two workers"
    reporter.go(FIRST)  # more comes while it is down, or starts
    until(lambda: log(head, "mlflow").count("mlflow started") > started, seconds=LIMIT_SECONDS)
    reporter.until_logged(FIRST)
    assert reporter.logged <= SECOND < COUNT, "the next kill is in the middle, too"

    assert kill_all(head, DATABASE) >= 5
    reporter.go(SECOND)
    until(lambda: "started again" in log(head, "database"), lambda: log(head, "database"), LIMIT_SECONDS)
    said = reporter.end()
    assert "0 late, ended" in said
    print(
        said,
        log(head, "database"),
        re.findall(r"(?m)^20.*mlflow (?:started|ended|does).*$", log(head, "mlflow")),
    )
    until(lambda: answers(head), lambda: log(head, "mlflow"), LIMIT_SECONDS)
    assert reporter.wrong() == []

    head.run(*reporter.command("spoil"))
    wrong = reporter.wrong()
    assert len([line for line in wrong if "0 children" in line]) == 1
    assert len([line for line in wrong if "2 children" in line]) == 1
    assert len([line for line in wrong if "is RUNNING" in line]) == 2
    assert len([line for line in wrong if "rows" in line]) == 1, "the check sees what is missing"


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_ray_up_again_starts_a_database_that_has_died_and_keeps_what_is_in_it(head: Host) -> None:
    shell(head, "psql -q -h /var/run/postgresql mlflow -c 'create table kept (a int)'")
    kill_all(head, KEEPER)
    assert kill_all(head, DATABASE) >= 5
    for command in CONFIG["head_setup_commands"]:
        shell(head, command)
    counted = shell(head, "psql -At -h /var/run/postgresql mlflow -c 'select count(*) from kept'")
    assert counted.endswith("0\n")


def test_without_postgresql_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert lacks_postgresql().endswith("apt-get install postgresql")
