"""MLflow's server on PostgreSQL, started by cluster.yaml's commands on a host of the lab.

A dead service is restarted, no reported value is lost, and no other machine can connect.
"""

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
"""Numbers of records after which the reporter waits, so that the test can kill a service."""
LIMIT_SECONDS = 600.0
HEAD, OTHER = "10.77.0.2", "10.77.0.3"
STATE = "/root/.lora-orchestrator"


@pytest.fixture(scope="module")
def lab(can_have_a_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(read_only=[ROOT], shared=tmp_path_factory.mktemp("shared")) as network:
        yield network


@pytest.fixture(scope="module")
def head(lab: Lab) -> Host:
    """Return a head with a new PostgreSQL, which is set up but does not run its services yet."""
    if reason := lacks_postgresql():
        pytest.skip(reason)
    host = lab.host("head", HEAD, empty=POSTGRESQL)
    host.create_postgresql()
    for remote, local in CONFIG["file_mounts"].items():
        if not local.startswith("~"):
            source, target = ROOT / local, host.path(remote.replace("~", "/root"))
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    host.install_environment("/root/venv")
    for command in CONFIG["setup_commands"]:
        # Skip the command that needs AWS, and the installation of packages.
        if "lora_env" in command and "AWS_" not in command:
            shell(host, command)
    for command in CONFIG["head_setup_commands"]:
        shell(host, command)
    return host


@pytest.fixture(scope="module")
def services(head: Host) -> Host:
    """Start the head's services, and return the head.

    Ray does not run there, so --with-ray, which would end the services, is left out.
    """
    commands = [c for c in CONFIG["head_start_ray_commands"] if "orchestrator.cluster.node.supervisor" in c]
    assert len(commands) == 2
    for command in commands:
        assert " --with-ray " in command
        shell(head, command.replace(" --with-ray ", " "))
    until(
        lambda: mlflow_answers(head),
        lambda: f"MLflow's server does not start\n{log(head, 'mlflow')}",
        LIMIT_SECONDS,
    )
    return head


def shell(host: Host, command: str) -> str:
    """Run a command as Ray does on a node."""
    line = f"source ~/.bashrc; ({command})"
    return host.run("bash", "--login", "-c", "-i", line, timeout=LIMIT_SECONDS)


def mlflow_answers(host: Host) -> bool:
    request = "curl -s -m 60 --noproxy '*' http://127.0.0.1:5000/health"
    return host.run("sh", "-c", request, check=False) == "OK"


def log(host: Host, name: str) -> str:
    return host.path(f"{STATE}/{name}.log").read_text()


def kill_all(host: Host, pattern: str) -> int:
    """Kill all processes whose command lines match. Returns their number."""
    pids = [pid for pid, line in host.processes().items() if re.search(pattern, line)]
    for pid in pids:
        with suppress(ProcessLookupError):  # some processes end when the first is killed
            os.kill(pid, signal.SIGKILL)
    return len(pids)


SERVER = r"mlflow server|uvicorn|multiprocessing\.spawn|multiprocessing\.resource_tracker"
DATABASE = r"^/usr/lib/postgresql/|^postgres: "
SUPERVISOR = r"orchestrator\.cluster\.node\.supervisor|database\.sh watch"


class Reporter:
    """Process on the head that reports records as a study's driver does; see reporter.py."""

    def __init__(self, host: Host) -> None:
        self.host, self.folder = host, host.path("/root/reporter")
        self.folder.mkdir()
        shutil.copy(ROOT / "tests/cluster/reporter.py", self.folder)
        shutil.copy(ROOT / "tests/record/conftest.py", self.folder / "records.py")
        shutil.copy(ROOT / "tests/study/in_process.py", self.folder)  # records.py imports it
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        line = f"source ~/.bashrc; exec python ~/reporter/reporter.py {' '.join(words)}"
        return ["bash", "--login", "-c", "-i", line]

    def start(self) -> None:
        words = self.command("report", str(COUNT), *map(str, HALTS))
        with (self.folder / "output").open("wb") as output:
            self.process = self.host.start(*words, output=output)

    def go(self, halt: int) -> None:
        (self.folder / f"{halt}.go").touch()

    def until_logged(self, more_than: int) -> None:
        """Wait until MLflow has more than this number of records. Fails if the reporter ends first."""
        until(lambda: self.logged > more_than or self.ended(), self.output, LIMIT_SECONDS)
        assert not self.ended(), self.output()

    @property
    def logged(self) -> int:
        file = self.folder / "logged"
        return int(file.read_text() or 0) if file.exists() else 0

    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def end(self) -> str:
        until(self.ended, self.output, LIMIT_SECONDS)
        assert self.process is not None
        assert self.process.returncode == 0, self.output()
        return self.output()

    def find_errors(self) -> list[str]:
        output = self.host.run(*self.command("check", str(COUNT)), timeout=LIMIT_SECONDS)
        return json.loads(output.splitlines()[-1])


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_no_other_machine_can_connect_to_the_services(lab: Lab, services: Host) -> None:
    head, other = services, lab.host("other", OTHER)

    def connects(host: Host, address: str, port: int) -> bool:
        """Return whether a connection succeeds; False if it is refused. Other results are errors."""
        output = host.run("bash", "-c", f"echo > /dev/tcp/{address}/{port} && echo open", check=False)
        assert output == "open\n" or "Connection refused" in output, output
        return output == "open\n"

    head.start("python", "-m", "http.server", "--bind", HEAD, "5001")
    until(
        lambda: connects(other, HEAD, 5001),
        lambda: "the other host cannot connect to a server that listens for it",
    )
    assert connects(other, HEAD, 22)
    for port in (5000, 5432):
        assert connects(head, "127.0.0.1", port)
        assert not connects(head, HEAD, port)
        assert not connects(other, HEAD, port)
    sockets = head.run("ss", "-Hltn").splitlines()
    assert {line.split()[3] for line in sockets if not re.search(r"127\.0\.0\.1:|\[::1\]:", line)} == {
        f"{HEAD}:22",
        f"{HEAD}:5001",
    }
    # Other users of the head cannot connect either: PostgreSQL has no passwords that they could guess.
    with pytest.raises(CommandError, match="authentication failed"):
        head.run("runuser", "-u", "nobody", "--", "psql", "-h", "/var/run/postgresql", "-U", "root", "mlflow")


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_dead_services_are_restarted_and_nothing_that_was_reported_is_lost(services: Host) -> None:
    head, reporter = services, Reporter(services)
    reporter.start()
    reporter.until_logged(FIRST // 2)

    started = log(head, "mlflow").count("mlflow started")
    assert kill_all(head, SERVER) >= 3, "the server and its two workers"
    reporter.go(FIRST)  # more records arrive while the server is down or starts
    until(lambda: log(head, "mlflow").count("mlflow started") > started, seconds=LIMIT_SECONDS)
    reporter.until_logged(FIRST)
    assert reporter.logged <= SECOND < COUNT, "the next kill comes before the end, too"

    assert kill_all(head, DATABASE) >= 5
    reporter.go(SECOND)
    until(lambda: "PostgreSQL is gone" in log(head, "database"), lambda: log(head, "database"), LIMIT_SECONDS)
    output = reporter.end()
    assert "0 late, ended" in output
    print(
        output,
        log(head, "database"),
        re.findall(r"(?m)^20.*mlflow (?:started|ended|does).*$", log(head, "mlflow")),
    )
    until(lambda: mlflow_answers(head), lambda: log(head, "mlflow"), LIMIT_SECONDS)
    assert reporter.find_errors() == []

    head.run(*reporter.command("spoil"))
    errors = reporter.find_errors()
    assert len([line for line in errors if "0 children" in line]) == 1
    assert len([line for line in errors if "2 children" in line]) == 1
    assert len([line for line in errors if "is RUNNING" in line]) == 2
    assert len([line for line in errors if "rows" in line]) == 1, "the check finds a missing row"


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_ray_up_again_starts_a_dead_database_and_keeps_its_data(head: Host) -> None:
    shell(head, "psql -q -h /var/run/postgresql mlflow -c 'create table kept (a int)'")
    kill_all(head, SUPERVISOR)
    assert kill_all(head, DATABASE) >= 5
    for command in CONFIG["head_setup_commands"]:
        shell(head, command)
    count = shell(head, "psql -At -h /var/run/postgresql mlflow -c 'select count(*) from kept'")
    assert count.endswith("0\n")


def test_without_postgresql_the_reason_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert lacks_postgresql().endswith("apt-get install postgresql")
