"""The supervisor, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import keep

ROOT = Path(keep.__file__).parents[2]
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

    def start(self, *options: str, arguments: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "orchestrator.cluster.keep", "server", "--look", "0.2", *options]
        command += ["--", sys.executable, "-c", SERVER, *arguments]
        environment = {**os.environ, "HOME": str(self.home)}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=60, stdout=subprocess.DEVNULL)

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


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "did not happen within a minute"
        time.sleep(0.1)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    for keeper in kept.keepers():
        keeper.terminate()
    until(lambda: not kept.alive())


def test_a_command_that_dies_is_started_again_with_nothing_of_it_left(kept: Kept) -> None:
    kept.start()
    os.kill(kept.wait_for(1), signal.SIGKILL)
    kept.wait_for(2)
    until(lambda: len(kept.alive()) == 3)  # the keeper, the command, its child: that of the first has gone


def test_a_server_that_no_longer_answers_is_started_again(kept: Kept) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    kept.start("--health", url, arguments=(str(port),))
    assert keep.answers(url), "it comes back when the server answers"
    first = kept.wait_for(1)
    time.sleep(1)  # the keeper has seen it answer, too
    os.kill(first, signal.SIGSTOP)  # lives, and is deaf; a stopped process takes no SIGTERM either
    second = kept.wait_for(2)
    until(lambda: keep.answers(url))
    assert second != first
    assert "does not answer" in kept.log.read_text()
    kept.start("--health", url, arguments=(str(port),))
    assert len(kept.numbers()) > 2, "what answered before is not what it waits for"
    assert keep.answers(url)


def test_a_second_keeper_takes_over(kept: Kept) -> None:
    kept.start()
    first = kept.wait_for(1)
    kept.start()
    kept.wait_for(2)
    until(lambda: not psutil.pid_exists(first))
    assert len(kept.keepers()) == 1
    until(lambda: len(kept.alive()) == 3)


def test_the_command_of_a_keeper_that_was_killed_is_ended_by_the_next(kept: Kept) -> None:
    kept.start()
    first = kept.wait_for(1)
    until(lambda: len(kept.alive()) == 3)
    kept.keepers()[0].kill()
    time.sleep(0.5)
    assert psutil.pid_exists(first), "it could not end its command"
    kept.start()
    kept.wait_for(2)
    until(lambda: len(kept.alive()) == 3)


# A keeper in whose eyes Ray is there while a file is.
BESIDE_RAY = """
import sys
from pathlib import Path
from orchestrator.cluster import keep, raylets
raylets.here = lambda: Path(sys.argv[1]).exists()
keep.main(["server", "--foreground", "--look", "0.2", "--with-ray", "--", *sys.argv[2:]])
"""


def test_with_ray_it_ends_when_ray_does(kept: Kept) -> None:
    ray = kept.home / "ray"
    ray.touch()
    with (kept.home / "said").open("w") as said:
        keeper = subprocess.Popen(
            [sys.executable, "-c", BESIDE_RAY, str(ray), sys.executable, "-c", SERVER],
            env={**os.environ, "HOME": str(kept.home)},
            cwd=ROOT,
            stdout=said,
        )
    os.kill(kept.wait_for(1), signal.SIGKILL)
    kept.wait_for(2)
    time.sleep(1)
    assert keeper.poll() is None
    ray.unlink()
    assert keeper.wait(60) == 0
    assert "Ray is not here any more" in (kept.home / "said").read_text()
    until(lambda: not kept.alive())


def test_a_keeper_that_is_told_to_end_takes_all_with_it(kept: Kept) -> None:
    kept.start()
    kept.wait_for(1)
    kept.keepers()[0].terminate()
    until(lambda: not kept.alive())
