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
from orchestrator.execution.ray.cleanup import boot_id, start_time_since_boot
from orchestrator.util import timeouts

FAILURE_THRESHOLD = (
    3  # so many looks without an answer, and it is started again; without Ray, and it is ended
)
MAX_LOG_BYTES = 20 * 2**20  # beyond it the log begins anew when the command does


def state_folder() -> Path:
    return Path.home() / ".lora-orchestrator"


def is_healthy(url: str) -> bool:
    """Whether a GET of the URL succeeds within seconds; asked directly, through no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError), opener.open(url, timeout=timeouts.HEALTH_POLL_SECONDS) as answer:
        return answer.status < 400
    return False


class Supervisor:
    """Runs one command for ever. `run` returns only when the process gets SIGTERM, or with Ray, with the
    command ended.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        health_url: str | None,
        poll_seconds: float = timeouts.HEALTH_POLL_SECONDS,
        with_ray: bool = False,
    ) -> None:
        self.name, self.command, self.health_url, self.poll_seconds = name, command, health_url, poll_seconds
        self.with_ray = with_ray
        self._checks_without_ray = 0
        """So many looks."""
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._request_stop)
        with _take_over(_lock_path(self.name)) as lock_file:
            backoff = timeouts.INITIAL_BACKOFF_SECONDS
            while not self._is_stopping:
                begun = time.monotonic()
                self._child = self._start_command(lock_file)
                self._wait_for_command(begun)
                _terminate_group(self._child.pid)  # also what a server that has died left behind
                code = self._child.wait()
                backoff = (
                    timeouts.INITIAL_BACKOFF_SECONDS
                    if time.monotonic() - begun > timeouts.STABLE_SECONDS
                    else min(2 * backoff, timeouts.MAX_BACKOFF_SECONDS)
                )
                log_line(f"{self.name} ended ({code})")
                self._sleep(backoff)

    def _start_command(self, lock_file: IO[str]) -> subprocess.Popen[bytes]:
        log = state_folder() / f"{self.name}.log"
        with log.open("wb" if log.exists() and log.stat().st_size > MAX_LOG_BYTES else "ab") as output:
            child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        _write_state(lock_file, child.pid)
        log_line(f"{self.name} started (process {child.pid})")
        return child

    def _wait_for_command(self, started: float) -> None:
        """Until the command ends, no longer answers, or this process is told to end."""
        answered, failed_checks = False, 0
        assert self._child is not None
        while not self._is_stopping and self._child.poll() is None:
            self._sleep(self.poll_seconds)
            if self.with_ray:
                self._check_ray()
            if self.health_url is None or self._child.poll() is not None:
                continue
            if is_healthy(self.health_url):
                answered, failed_checks = True, 0
            elif answered or time.monotonic() - started > timeouts.SERVER_STARTUP_SECONDS:
                failed_checks += 1
                if failed_checks >= FAILURE_THRESHOLD:
                    log_line(f"{self.name} does not answer at {self.health_url}: started again")
                    return

    def _check_ray(self) -> None:
        self._checks_without_ray = 0 if raylets.find_local_raylets() else self._checks_without_ray + 1
        if self._checks_without_ray >= FAILURE_THRESHOLD and not self._is_stopping:
            log_line(f"Ray is not here any more: {self.name} ends")
            self._is_stopping = True

    def _sleep(self, seconds: float) -> None:
        """Shorter when this process is told to end."""
        until = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < until:
            time.sleep(0.1)

    def _request_stop(self, *_: object) -> None:
        self._is_stopping = True


def _lock_path(name: str) -> Path:
    return state_folder() / f"{name}.keeper"


def _wait_until_healthy(name: str, process: subprocess.Popen[bytes], health_url: str) -> bool:
    """Whether the command of this keeper answers, within the time that it has to start. Its predecessor's may
    do so until it is ended.
    """
    until = time.monotonic() + timeouts.SERVER_STARTUP_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), _lock_path(name).open() as file:
            state = _read_state(file)
            if state.get("keeper") == process.pid and state.get("child") and is_healthy(health_url):
                return True
        time.sleep(0.2)
    return False


@contextmanager
def _take_over(path: Path) -> Iterator[IO[str]]:
    """Holds the file that says who keeps NAME, after ending whoever held it and the command that was left."""
    with path.open("a+") as file:
        kill_deadline = time.monotonic() + 2 * timeouts.SERVER_TERMINATE_SECONDS
        while not _try_lock(file):
            keeper = _read_state(file).get("keeper", 0)
            with suppress(ProcessLookupError):  # while the lock is held this number is the keeper's
                if keeper:
                    os.kill(keeper, signal.SIGKILL if time.monotonic() > kill_deadline else signal.SIGTERM)
            time.sleep(0.2)
        previous = _read_state(file)
        with suppress(psutil.Error):  # a keeper that was killed could not end its command
            began = start_time_since_boot(psutil.Process(previous.get("child", 0)))
            if previous.get("boot") == boot_id() and abs(began - previous.get("born", -1.0)) < 1.0:
                _terminate_group(previous["child"])
        _write_state(file, 0)
        yield file


def _try_lock(file: IO[str]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _read_state(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    with suppress(ValueError):
        data = json.loads(file.read())
        return data if isinstance(data, dict) else {}
    return {}


def _write_state(file: IO[str], child_pid: int) -> None:
    began = -1.0
    with suppress(psutil.Error):
        began = start_time_since_boot(psutil.Process(child_pid)) if child_pid else -1.0
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"keeper": os.getpid(), "child": child_pid, "born": began, "boot": boot_id()}))
    file.flush()


def _terminate_group(group_id: int) -> None:
    """All of a command's process group: asked to end, then killed."""
    for number, seconds in (
        (signal.SIGTERM, timeouts.SERVER_TERMINATE_SECONDS),
        (signal.SIGKILL, timeouts.SERVER_TERMINATE_SECONDS),
    ):
        with suppress(ProcessLookupError):
            os.killpg(group_id, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not any(p.status() != psutil.STATUS_ZOMBIE for p in _group_processes(group_id)):
                return
            time.sleep(0.1)


def _group_processes(group_id: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group_id and process.is_running():
                found.append(process)
    return found


def log_line(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.node.supervisor", description=__doc__
    )
    parser.add_argument("name", help="what the log and the keeper are called by")
    parser.add_argument("--health", help="a URL that answers while the command is well")
    parser.add_argument(
        "--look", type=float, default=timeouts.HEALTH_POLL_SECONDS, help="seconds between two looks"
    )
    parser.add_argument("--with-ray", action="store_true", help="end when Ray has left this machine")
    parser.add_argument("--foreground", action="store_true", help="stay in this process")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(arguments)
    state_folder().mkdir(mode=0o700, exist_ok=True)
    if options.foreground:
        Supervisor(options.name, options.command, options.health, options.look, options.with_ray).run()
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
    with (state_folder() / f"{options.name}.log").open("ab") as log:
        process = subprocess.Popen(
            again, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    well = not options.health or _wait_until_healthy(options.name, process, options.health)
    state = "kept running" if well else "kept running, and does not answer so far"
    print(f"{options.name}: {state}; its log: {state_folder() / options.name}.log")
    return 0


if __name__ == "__main__":
    sys.exit(main())
