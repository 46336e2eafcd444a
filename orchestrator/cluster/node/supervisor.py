"""Keeps a command running: started again when it ends, and when it no longer answers.

    python -m orchestrator.cluster.node.supervisor NAME [--health URL] [--with-ray] -- COMMAND ...

Comes back at once, or with --health when the command answers, or has not for minutes: who types `ray up` and
then a study is not refused for a server that starts. The keeper stays behind, as one process that belongs to
no terminal. Called again with the same NAME it ends the former keeper with its command and takes over: `ray
up` may be repeated. What the command prints is in ~/.lora-orchestrator/NAME.log. `--with-ray`: both end when
Ray has left this machine, as after `ray down` where that ends no machine. systemd would do, but not every
machine and no container has it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from orchestrator.cluster.node import raylets
from orchestrator.execution.ray.cleanup import boot, born

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # before a command that keeps ending is started again
LONG_ENOUGH = 60.0  # a command that lived so long had not failed to start
LOOK_SECONDS = 5.0  # between two looks at a command's health, and for an answer
START_SECONDS = 180.0  # a server has so long to answer for the first time: MLflow migrates its database
DEAF_LOOKS = 3  # so many looks without an answer, and it is started again; without Ray, and it is ended
END_SECONDS = 15.0  # between SIGTERM and SIGKILL
LOG_BYTES = 20 * 2**20  # beyond it the log begins anew when the command does


def folder() -> Path:
    return Path.home() / ".lora-orchestrator"


def answers(url: str) -> bool:
    """Whether a GET of the URL succeeds within seconds; asked directly, through no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError), opener.open(url, timeout=LOOK_SECONDS) as answer:
        return answer.status < 400
    return False


class Keeper:
    """Runs one command for ever. `run` returns only when the process gets SIGTERM, or with Ray, with the
    command ended."""

    def __init__(
        self,
        name: str,
        command: list[str],
        health: str | None,
        look: float = LOOK_SECONDS,
        with_ray: bool = False,
    ) -> None:
        self.name, self.command, self.health, self.look = name, command, health, look
        self.with_ray = with_ray
        self._without_ray = 0
        """So many looks."""
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = False

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._end)
        with _taken_over(_keeper_file(self.name)) as mine:
            pause = FIRST_PAUSE
            while not self._ending:
                begun = time.monotonic()
                self._child = self._start(mine)
                self._watch(begun)
                _end_group(self._child.pid)  # also what a server that has died left behind
                code = self._child.wait()
                pause = (
                    FIRST_PAUSE if time.monotonic() - begun > LONG_ENOUGH else min(2 * pause, LONGEST_PAUSE)
                )
                say(f"{self.name} ended ({code})")
                self._sleep(pause)

    def _start(self, mine: IO[str]) -> subprocess.Popen[bytes]:
        log = folder() / f"{self.name}.log"
        with log.open("wb" if log.exists() and log.stat().st_size > LOG_BYTES else "ab") as output:
            child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        _write(mine, child.pid)
        say(f"{self.name} started (process {child.pid})")
        return child

    def _watch(self, begun: float) -> None:
        """Until the command ends, no longer answers, or this process is told to end."""
        answered, deaf = False, 0
        assert self._child is not None
        while not self._ending and self._child.poll() is None:
            self._sleep(self.look)
            if self.with_ray:
                self._look_for_ray()
            if self.health is None or self._child.poll() is not None:
                continue
            if answers(self.health):
                answered, deaf = True, 0
            elif answered or time.monotonic() - begun > START_SECONDS:
                deaf += 1
                if deaf >= DEAF_LOOKS:
                    say(f"{self.name} does not answer at {self.health}: started again")
                    return

    def _look_for_ray(self) -> None:
        self._without_ray = 0 if raylets.here() else self._without_ray + 1
        if self._without_ray >= DEAF_LOOKS and not self._ending:
            say(f"Ray is not here any more: {self.name} ends")
            self._ending = True

    def _sleep(self, seconds: float) -> None:
        """Shorter when this process is told to end."""
        until = time.monotonic() + seconds
        while not self._ending and time.monotonic() < until:
            time.sleep(0.1)

    def _end(self, *_: object) -> None:
        self._ending = True


def _keeper_file(name: str) -> Path:
    return folder() / f"{name}.keeper"


def _awaited(name: str, keeper: subprocess.Popen[bytes], health: str) -> bool:
    """Whether the command of this keeper answers, within the time that it has to start. Its predecessor's may
    do so until it is ended."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and keeper.poll() is None:
        with suppress(OSError), _keeper_file(name).open() as file:
            now = _read(file)
            if now.get("keeper") == keeper.pid and now.get("child") and answers(health):
                return True
        time.sleep(0.2)
    return False


@contextmanager
def _taken_over(path: Path) -> Iterator[IO[str]]:
    """Holds the file that says who keeps NAME, after ending whoever held it and the command that was left."""
    with path.open("a+") as file:
        patience = time.monotonic() + 2 * END_SECONDS
        while not _locked(file):
            keeper = _read(file).get("keeper", 0)
            with suppress(ProcessLookupError):  # while the lock is held this number is the keeper's
                if keeper:
                    os.kill(keeper, signal.SIGKILL if time.monotonic() > patience else signal.SIGTERM)
            time.sleep(0.2)
        left = _read(file)
        with suppress(psutil.Error):  # a keeper that was killed could not end its command
            began = born(psutil.Process(left.get("child", 0)))
            if left.get("boot") == boot() and abs(began - left.get("born", -1.0)) < 1.0:
                _end_group(left["child"])
        _write(file, 0)
        yield file


def _locked(file: IO[str]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    with suppress(ValueError):
        data = json.loads(file.read())
        return data if isinstance(data, dict) else {}
    return {}


def _write(file: IO[str], child: int) -> None:
    began = -1.0
    with suppress(psutil.Error):
        began = born(psutil.Process(child)) if child else -1.0
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"keeper": os.getpid(), "child": child, "born": began, "boot": boot()}))
    file.flush()


def _end_group(group: int) -> None:
    """All of a command's process group: asked to end, then killed."""
    for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        with suppress(ProcessLookupError):
            os.killpg(group, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not any(p.status() != psutil.STATUS_ZOMBIE for p in _members(group)):
                return
            time.sleep(0.1)


def _members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and process.is_running():
                found.append(process)
    return found


def say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.node.supervisor", description=__doc__
    )
    parser.add_argument("name", help="what the log and the keeper are called by")
    parser.add_argument("--health", help="a URL that answers while the command is well")
    parser.add_argument("--look", type=float, default=LOOK_SECONDS, help="seconds between two looks")
    parser.add_argument("--with-ray", action="store_true", help="end when Ray has left this machine")
    parser.add_argument("--foreground", action="store_true", help="stay in this process")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(arguments)
    folder().mkdir(mode=0o700, exist_ok=True)
    if options.foreground:
        Keeper(options.name, options.command, options.health, options.look, options.with_ray).run()
        return 0
    again = [
        sys.executable,
        "-m",
        "orchestrator.cluster.node.supervisor",
        "--foreground",
        "--look",
        str(options.look),
    ]
    again += ["--health", options.health] if options.health else []
    again += ["--with-ray"] if options.with_ray else []
    again += [options.name, "--", *options.command]
    with (folder() / f"{options.name}.log").open("ab") as log:
        keeper = subprocess.Popen(
            again, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    well = not options.health or _awaited(options.name, keeper, options.health)
    state = "kept running" if well else "kept running, and does not answer so far"
    print(f"{options.name}: {state}; its log: {folder() / options.name}.log")
    return 0


if __name__ == "__main__":
    sys.exit(main())
