"""The supervisor, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from events import LIMIT_SECONDS, reserved_port, until

from orchestrator.cluster.node import supervisor

pytestmark = pytest.mark.cluster
ROOT = Path(supervisor.__file__).parents[3]
# A server with a child process, as MLflow's server has. It first prints its process id.
SERVER = """
import http.server, os, subprocess, sys
print("pid", os.getpid(), flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if len(sys.argv) > 1:
    address = ("127.0.0.1", int(sys.argv[1]))
    http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
import time; time.sleep(600)
"""


class Supervised:
    """A supervised command with a home directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / ".lora-orchestrator" / "server.log"
        self.output = home / "output"
        """Output of a supervisor in the foreground."""
        self._foreground: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Start a supervisor in the background, and return what it prints."""
        command = [sys.executable, "-m", "orchestrator.cluster.node.supervisor", "server", *options]
        command += ["--", sys.executable, "-c", SERVER, *arguments]
        return subprocess.check_output(
            command, env=self.environment(), cwd=ROOT, timeout=LIMIT_SECONDS, text=True
        )

    def foreground(
        self, script: str, *arguments: str, server: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a supervisor from a script, which receives `arguments` and the supervised command."""
        command = [sys.executable, "-c", script, *arguments, sys.executable, "-c", SERVER, *server]
        with self.output.open("wb") as output:
            process = subprocess.Popen(command, env=self.environment(), cwd=ROOT, stdout=output)
        self._foreground.append(process)
        return process

    def close(self) -> None:
        for process in self.supervisors():
            process.terminate()
        until(lambda: not self.processes())
        for process in self._foreground:
            process.wait()

    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home)}

    def pids(self) -> list[int]:
        """Return the process ids of all commands that have been started so far."""
        text = self.log.read_text() if self.log.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be half written
        return [int(line.split()[1]) for line in whole.splitlines() if line.startswith("pid")]

    def wait_for(self, count: int) -> int:
        until(lambda: len(self.pids()) >= count)
        return self.pids()[count - 1]

    def supervisors(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if "--foreground" in command_line(p) and self.has_home(p)]

    def has_home(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get("HOME") == str(self.home)
        return False

    def processes(self) -> list[str]:
        """Return the command lines of all running processes with this home directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and self.has_home(process):
                    found.append(command_line(process))
        return found


def command_line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    yield supervised
    supervised.close()


def test_a_command_that_dies_is_restarted_and_its_children_are_ended(supervised: Supervised) -> None:
    supervised.start()
    os.kill(supervised.wait_for(1), signal.SIGKILL)
    supervised.wait_for(2)
    # The supervisor, the command and its child run; the first child has ended.
    until(lambda: len(supervised.processes()) == 3)


def test_the_command_returns_when_the_server_answers(supervised: Supervised) -> None:
    with reserved_port() as port:
        for times in (1, 2):  # the second call waits for its own server, not for the first
            output = supervised.start("--health", f"http://127.0.0.1:{port}/", arguments=(str(port),))
            assert "is supervised; " in output
            *_, newest = supervised.log.read_text().split("pid ")
            assert len(supervised.pids()) >= times
            assert '"GET / HTTP' in newest


# A supervisor with shorter time-outs than on a cluster. It prints "answered" when the server answers.
SUPERVISE_SERVER = """
import sys
from orchestrator.cluster.node import supervisor
from orchestrator.util import timeouts
timeouts.HEALTH_POLL_SECONDS = timeouts.SERVER_TERMINATE_SECONDS = 1.0
is_healthy = supervisor.is_healthy
def logged(url):
    if answered := is_healthy(url):
        print("answered", flush=True)
    return answered
supervisor.is_healthy = logged
supervisor.main(["server", "--foreground", "--health", sys.argv[1], "--", *sys.argv[2:]])
"""


def test_a_server_that_does_not_answer_any_more_is_restarted(supervised: Supervised) -> None:
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/"
        supervised.foreground(SUPERVISE_SERVER, url, server=(str(port),))
        until(lambda: "answered" in supervised.output.read_text())
        first = supervised.pids()[-1]
        os.kill(first, signal.SIGSTOP)  # the server lives, but neither answers nor reacts to SIGTERM
        before = len(supervised.pids())
        supervised.wait_for(before + 1)
        # The supervisor, the server and its child run; the first child has ended.
        until(lambda: len(supervised.processes()) == 3)
        until(lambda: supervisor.is_healthy(url))
        assert "does not answer" in supervised.output.read_text()


def test_a_second_supervisor_replaces_the_first(supervised: Supervised) -> None:
    supervised.start()
    first = supervised.wait_for(1)
    supervised.start()
    supervised.wait_for(2)
    until(lambda: not psutil.pid_exists(first))
    until(lambda: len(supervised.supervisors()) == 1)
    until(lambda: len(supervised.processes()) == 3)


def test_the_command_of_a_killed_supervisor_is_ended_by_the_next_one(supervised: Supervised) -> None:
    supervised.start()
    first = supervised.wait_for(1)
    until(lambda: len(supervised.processes()) == 3)
    supervised.supervisors()[0].kill()
    until(lambda: not supervised.supervisors())
    assert psutil.pid_exists(first), "a killed supervisor cannot end its command"
    supervised.start()
    supervised.wait_for(2)
    until(lambda: len(supervised.processes()) == 3)


# A supervisor that finds Ray running while a file exists, and counts its checks in another file.
SUPERVISE_WITH_RAY = """
import sys
from pathlib import Path
from orchestrator.cluster.node import raylets, supervisor
from orchestrator.util import timeouts
ray, checks = map(Path, sys.argv[1:3])
def find_local_raylets():
    with checks.open("a") as file:
        file.write(".")
    return ray.exists()
raylets.find_local_raylets = find_local_raylets
timeouts.HEALTH_POLL_SECONDS = 0.2
supervisor.main(["server", "--foreground", "--with-ray", "--", *sys.argv[3:]])
"""


def test_with_ray_the_supervisor_ends_when_ray_ends(supervised: Supervised) -> None:
    ray, checks = supervised.home / "ray", supervised.home / "checks"
    ray.touch()
    process = supervised.foreground(SUPERVISE_WITH_RAY, str(ray), str(checks))
    os.kill(supervised.wait_for(1), signal.SIGKILL)
    supervised.wait_for(2)
    before = checks.stat().st_size if checks.exists() else 0
    until(lambda: checks.stat().st_size > before + supervisor.FAILURE_THRESHOLD)
    assert process.poll() is None
    ray.unlink()
    assert process.wait(LIMIT_SECONDS) == 0
    assert "Ray has left this machine" in supervised.output.read_text()
    until(lambda: not supervised.processes())


def test_a_terminated_supervisor_ends_its_command(supervised: Supervised) -> None:
    supervised.start()
    supervised.wait_for(1)
    supervised.supervisors()[0].terminate()
    until(lambda: not supervised.processes())
