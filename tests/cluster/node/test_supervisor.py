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
# A server with a child of its own, as MLflow's has. It says its number first.
SERVER = """
import http.server, os, subprocess, sys
print("number", os.getpid(), flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if len(sys.argv) > 1:
    place = ("127.0.0.1", int(sys.argv[1]))
    http.server.HTTPServer(place, http.server.SimpleHTTPRequestHandler).serve_forever()
import time; time.sleep(600)
"""


class Kept:
    """The command kept under a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / ".lora-orchestrator" / "server.log"
        self.said = home / "said"
        """What a keeper in the foreground says."""
        self._foreground: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Return what it prints."""
        command = [
            sys.executable,
            "-m",
            "orchestrator.cluster.node.supervisor",
            "server",
            "--look",
            "0.2",
            *options,
        ]
        command += ["--", sys.executable, "-c", SERVER, *arguments]
        return subprocess.check_output(
            command, env=self.environment(), cwd=ROOT, timeout=LIMIT_SECONDS, text=True
        )

    def foreground(
        self, script: str, *arguments: str, server: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a keeper by a script that takes `arguments`, then the command, and calls `keep.main`."""
        command = [sys.executable, "-c", script, *arguments, sys.executable, "-c", SERVER, *server]
        with self.said.open("wb") as said:
            process = subprocess.Popen(command, env=self.environment(), cwd=ROOT, stdout=said)
        self._foreground.append(process)
        return process

    def close(self) -> None:
        for keeper in self.keepers():
            keeper.terminate()
        until(lambda: not self.alive())
        for process in self._foreground:
            process.wait()

    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home)}

    def numbers(self) -> list[int]:
        """Of the commands so far."""
        text = self.log.read_text() if self.log.exists() else ""
        return [int(line.split()[1]) for line in text.splitlines() if line.startswith("number")]

    def wait_for(self, count: int) -> int:
        until(lambda: len(self.numbers()) >= count)
        return self.numbers()[count - 1]

    def keepers(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if "--foreground" in line(p) and self.home_of(p)]

    def home_of(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get("HOME") == str(self.home)
        return False

    def alive(self) -> list[str]:
        """All processes that were started here."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and self.home_of(process):
                    found.append(line(process))
        return found


def line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    kept.close()


def test_a_command_that_dies_is_started_again_with_nothing_of_it_left(kept: Kept) -> None:
    kept.start()
    os.kill(kept.wait_for(1), signal.SIGKILL)
    kept.wait_for(2)
    until(lambda: len(kept.alive()) == 3)  # the keeper, the command, its child: that of the first has gone


def test_the_command_of_a_killed_keeper_is_ended_though_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting the clock moves the time at which Linux says that the machine and its processes began."""
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        with (tmp_path / "server").open("a+") as file:
            supervisor._write_state(file, left.pid)
        began = psutil.boot_time()
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: began + 3600)
        with supervisor._take_over(tmp_path / "server"):
            assert left.poll() == -signal.SIGTERM
    finally:
        left.kill()
        left.wait()


def test_a_number_from_before_the_last_boot_ends_nobody(tmp_path: Path) -> None:
    """A process may have the same number and have started as many seconds after another boot."""
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    file = tmp_path / "server"
    try:
        with file.open("a+") as known:
            supervisor._write_state(known, other.pid)
        file.write_text(file.read_text().replace(supervisor.boot_id(), "another-boot"))
        with supervisor._take_over(file):
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_it_comes_back_when_the_server_answers(kept: Kept) -> None:
    with reserved_port() as port:
        for times in (1, 2):  # what answered before is not what the second one waits for
            said = kept.start("--health", f"http://127.0.0.1:{port}/", arguments=(str(port),))
            assert "kept running; " in said
            *_, newest = kept.log.read_text().split("number ")
            assert len(kept.numbers()) >= times
            assert '"GET / HTTP' in newest


# A keeper that waits less for an answer and for an end than on a cluster. It says when it is answered.
DEAF = """
import sys
from orchestrator.cluster.node import supervisor
from orchestrator.util import timeouts
timeouts.HEALTH_POLL_SECONDS = timeouts.SERVER_TERMINATE_SECONDS = 1.0
asks = supervisor.is_healthy
def answers(url):
    if answered := asks(url):
        print("answered", flush=True)
    return answered
supervisor.is_healthy = answers
supervisor.main(["server", "--foreground", "--look", "0.2", "--health", sys.argv[1], "--", *sys.argv[2:]])
"""


def test_a_server_that_no_longer_answers_is_started_again(kept: Kept) -> None:
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/"
        kept.foreground(DEAF, url, server=(str(port),))
        until(lambda: "answered" in kept.said.read_text())
        first = kept.numbers()[-1]
        os.kill(first, signal.SIGSTOP)  # lives, and is deaf; a stopped process takes no SIGTERM either
        before = len(kept.numbers())
        kept.wait_for(before + 1)
        until(lambda: len(kept.alive()) == 3)  # the keeper, the server, its child: that of the first has gone
        until(lambda: supervisor.is_healthy(url))
        assert "does not answer" in kept.said.read_text()


def test_a_second_keeper_takes_over(kept: Kept) -> None:
    kept.start()
    first = kept.wait_for(1)
    kept.start()
    kept.wait_for(2)
    until(lambda: not psutil.pid_exists(first))
    until(lambda: len(kept.keepers()) == 1)
    until(lambda: len(kept.alive()) == 3)


def test_the_command_of_a_keeper_that_was_killed_is_ended_by_the_next(kept: Kept) -> None:
    kept.start()
    first = kept.wait_for(1)
    until(lambda: len(kept.alive()) == 3)
    kept.keepers()[0].kill()
    until(lambda: not kept.keepers())
    assert psutil.pid_exists(first), "it could not end its command"
    kept.start()
    kept.wait_for(2)
    until(lambda: len(kept.alive()) == 3)


# A keeper in whose eyes Ray is there while a file is. Its looks are counted in another.
BESIDE_RAY = """
import sys
from pathlib import Path
from orchestrator.cluster.node import supervisor; from orchestrator.cluster.node import raylets
ray, looks = map(Path, sys.argv[1:3])
def here():
    with looks.open("a") as file:
        file.write(".")
    return ray.exists()
raylets.find_local_raylets = here
supervisor.main(["server", "--foreground", "--look", "0.2", "--with-ray", "--", *sys.argv[3:]])
"""


def test_with_ray_it_ends_when_ray_does(kept: Kept) -> None:
    ray, looks = kept.home / "ray", kept.home / "looks"
    ray.touch()
    keeper = kept.foreground(BESIDE_RAY, str(ray), str(looks))
    os.kill(kept.wait_for(1), signal.SIGKILL)
    kept.wait_for(2)
    before = looks.stat().st_size if looks.exists() else 0
    until(lambda: looks.stat().st_size > before + supervisor.FAILURE_THRESHOLD)
    assert keeper.poll() is None
    ray.unlink()
    assert keeper.wait(LIMIT_SECONDS) == 0
    assert "Ray is not here any more" in kept.said.read_text()
    until(lambda: not kept.alive())


def test_a_keeper_that_is_told_to_end_takes_all_with_it(kept: Kept) -> None:
    kept.start()
    kept.wait_for(1)
    kept.keepers()[0].terminate()
    until(lambda: not kept.alive())
