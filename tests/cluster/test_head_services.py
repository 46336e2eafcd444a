"""What the head starts beside Ray, MLflow's server on PostgreSQL, by cluster.yaml's commands on a host of its
own: what dies is started again, nothing that was reported is missing, and nobody else reaches it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import yaml
from lab import POSTGRESQL, ROOT, Failed, Host, Lab, lacks_postgresql

pytestmark = pytest.mark.timeout(1200)  # a minute and a half, on a machine without other work
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
COUNT, ENOUGH = 200, 60
HEAD, OTHER = "10.77.0.2", "10.77.0.3"
STATE = "/root/.lora-orchestrator"


@pytest.fixture
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


def shell(host: Host, command: str, timeout: float = 120) -> str:
    """As Ray runs it there."""
    return host.run("bash", "--login", "-c", "-i", f"source ~/.bashrc; ({command})", timeout=timeout)


def start_services(host: Host) -> None:
    """All that the head starts in the end, but for Ray, with which they would end."""
    services = [c for c in CONFIG["head_start_ray_commands"] if "orchestrator.cluster.keep" in c]
    assert len(services) == 2
    for command in services:
        assert " --with-ray " in command
        shell(host, command.replace(" --with-ray ", " "))


def until(what: Callable[[], object], otherwise: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def answers(host: Host) -> bool:
    asked = "curl -s -m 5 --noproxy '*' http://127.0.0.1:5000/health"
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


class Reporter:
    """The study's driver on the head."""

    def __init__(self, host: Host) -> None:
        self.host, self.folder = host, host.path("/root/reporter")
        self.folder.mkdir()
        shutil.copy(ROOT / "tests/cluster/reporter.py", self.folder)
        shutil.copy(ROOT / "tests/record/conftest.py", self.folder / "records.py")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        line = f"source ~/.bashrc; exec python ~/reporter/reporter.py {' '.join(words)}"
        return ["bash", "--login", "-c", "-i", line]

    def start(self) -> None:
        with (self.folder / "said").open("wb") as output:
            self.process = self.host.start(*self.command("report", str(COUNT), str(ENOUGH)), output=output)

    def go(self) -> None:
        (self.folder / "go").touch()

    @property
    def logged(self) -> int:
        file = self.folder / "logged"
        return int(file.read_text() or 0) if file.exists() else 0

    def alive(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "said").read_text()

    def end(self) -> str:
        assert self.process is not None
        code = self.process.wait(400)
        said = (self.folder / "said").read_text()
        assert code == 0, said
        return said

    def wrong(self) -> list[str]:
        said = self.host.run(*self.command("check", str(COUNT)), timeout=300)
        return json.loads(said.splitlines()[-1])


def test_what_dies_is_started_again_and_nothing_that_was_reported_is_missing(head: Host) -> None:
    start_services(head)
    until(lambda: answers(head), "MLflow's server does not start")
    reporter = Reporter(head)
    reporter.start()
    until(lambda: reporter.alive() or reporter.logged >= ENOUGH / 2, "nothing is logged")

    assert kill_all(head, SERVER) >= 3, "the server and its two workers"
    assert not answers(head)
    before = reporter.logged
    assert before < COUNT
    reporter.go()  # all others come while it is down, or starts
    until(lambda: log(head, "mlflow").count("mlflow started") == 2, "its keeper does not start it again")
    until(lambda: reporter.logged > max(before, ENOUGH), "the writer does not go on")
    reporter.alive()
    assert reporter.logged < COUNT, "the next kill is in the middle, too"

    assert kill_all(head, DATABASE) >= 5
    with pytest.raises(Failed):
        shell(head, "psql -At -h /var/run/postgresql mlflow -c 'select 1'")
    until(lambda: "started again" in log(head, "database"), "nobody starts PostgreSQL again")
    said = reporter.end()
    assert "0 late, ended" in said
    print(
        said,
        log(head, "database"),
        re.findall(r"(?m)^20.*mlflow (?:started|ended|does).*$", log(head, "mlflow")),
    )
    until(lambda: answers(head), "MLflow's server does not answer any more")
    assert reporter.wrong() == []

    head.run(*reporter.command("spoil"))
    wrong = reporter.wrong()
    assert len([line for line in wrong if "0 children" in line]) == 1
    assert len([line for line in wrong if "2 children" in line]) == 1
    assert len([line for line in wrong if "is RUNNING" in line]) == 2
    assert len([line for line in wrong if "rows" in line]) == 1, "the check sees what is missing"


def test_ray_up_again_starts_a_database_that_has_died_and_keeps_what_is_in_it(head: Host) -> None:
    shell(head, "psql -q -h /var/run/postgresql mlflow -c 'create table kept (a int)'")
    assert kill_all(head, DATABASE) >= 5
    for command in CONFIG["head_setup_commands"]:
        shell(head, command)
    assert shell(head, "psql -At -h /var/run/postgresql mlflow -c 'select count(*) from kept'").endswith(
        "0\n"
    )


def test_no_other_machine_reaches_them(lab: Lab, head: Host) -> None:
    start_services(head)
    until(lambda: answers(head), "MLflow's server does not start")
    other = lab.host("other", OTHER)

    def connects(host: Host, address: str, port: int) -> bool:
        """False when it is refused; whatever else happens is an error."""
        said = host.run("timeout", "10", "bash", "-c", f"echo > /dev/tcp/{address}/{port}", check=False)
        assert not said or "Connection refused" in said, said
        return not said

    head.start("python", "-m", "http.server", "--bind", HEAD, "5001")
    until(lambda: connects(other, HEAD, 5001), "what listens there is reached from elsewhere")
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
    with pytest.raises(Failed, match="authentication failed"):
        head.run("runuser", "-u", "nobody", "--", "psql", "-h", "/var/run/postgresql", "-U", "root", "mlflow")


def test_without_postgresql_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert lacks_postgresql().endswith("apt-get install postgresql")
