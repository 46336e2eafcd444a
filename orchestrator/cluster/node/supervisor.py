"""Keep a command running: restart it when it ends, and when it does not answer any more.

    python -m orchestrator.cluster.node.supervisor NAME [--health URL] [--with-ray] -- COMMAND ...

The command returns at once and leaves a supervising process that belongs to no terminal. With --health it
returns when the supervised command answers, or after minutes without an answer, so that a study that is
started after `ray up` finds its server. A second call with the same NAME ends the former supervisor and its
command and replaces them: `ray up` may be repeated. The output of the command is appended to
~/.lora-orchestrator/NAME.log. With --with-ray, both end when Ray has left this machine, as after `ray down`
where that terminates no machine.

systemd is missing in containers and on some machines. supervisord would restart a command that ends, but it
checks no health, does not end with Ray, and leaves its commands behind when it is killed.
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

FAILURE_THRESHOLD = 3
"""Failed health checks in a row before a restart; checks without Ray before the end."""
MAX_LOG_BYTES = 20 * 2**20
"""Size above which the log is emptied at the next restart."""


def state_folder() -> Path:
    """Return the folder of locks and logs of this user."""
    return Path.home() / ".lora-orchestrator"


def is_healthy(url: str) -> bool:
    """Return whether a GET of the URL succeeds in time. Uses no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError), opener.open(url, timeout=timeouts.HEALTH_POLL_SECONDS) as response:
        return response.status < 400
    return False


class Supervisor:
    """Runs one command until this process is told to end.

    Args:
        name: Name of the lock and the log.
        command: The command and its arguments.
        health_url: A URL that answers while the command works; None: only its end leads to a restart.
        poll_seconds: Pause between two checks.
        with_ray: Whether to end when Ray has left this machine.
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
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> None:
        """Run the command until SIGTERM, or the end of Ray. The command has ended then."""
        signal.signal(signal.SIGTERM, self._request_stop)
        with _take_over(_lock_path(self.name)) as lock_file:
            backoff = timeouts.INITIAL_BACKOFF_SECONDS
            while not self._is_stopping:
                started = time.monotonic()
                self._child = self._start_command(lock_file)
                self._wait_for_command(started)
                _terminate_group(self._child.pid)  # including children that outlive a dead server
                code = self._child.wait()
                backoff = (
                    timeouts.INITIAL_BACKOFF_SECONDS
                    if time.monotonic() - started > timeouts.STABLE_SECONDS
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
        """Wait until the command ends or does not answer any more, or this process is told to end."""
        has_answered, failed_checks = False, 0
        assert self._child is not None
        while not self._is_stopping and self._child.poll() is None:
            self._sleep(self.poll_seconds)
            if self.with_ray:
                self._check_ray()
            if self.health_url is None or self._child.poll() is not None:
                continue
            if is_healthy(self.health_url):
                has_answered, failed_checks = True, 0
            elif has_answered or time.monotonic() - started > timeouts.SERVER_STARTUP_SECONDS:
                failed_checks += 1
                if failed_checks >= FAILURE_THRESHOLD:
                    log_line(f"{self.name} does not answer at {self.health_url}: restarting it")
                    return

    def _check_ray(self) -> None:
        self._checks_without_ray = 0 if raylets.find_local_raylets() else self._checks_without_ray + 1
        if self._checks_without_ray >= FAILURE_THRESHOLD and not self._is_stopping:
            log_line(f"Ray has left this machine: {self.name} ends")
            self._is_stopping = True

    def _sleep(self, seconds: float) -> None:
        """Sleep until the time is over or this process is told to end."""
        until = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < until:
            time.sleep(0.1)

    def _request_stop(self, *_: object) -> None:
        self._is_stopping = True


def _lock_path(name: str) -> Path:
    """Return the file that the supervisor locks; earlier releases use the same name and keys."""
    return state_folder() / f"{name}.keeper"


def _wait_until_healthy(name: str, process: subprocess.Popen[bytes], health_url: str) -> bool:
    """Wait until the command of this supervisor answers. Returns False when the time is over.

    Answers do not count until `process` holds the lock: they may come from its predecessor's command.
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
    """Lock the file, after ending the supervisor that holds it and a command that was left behind."""
    with path.open("a+") as file:
        kill_deadline = time.monotonic() + 2 * timeouts.SERVER_TERMINATE_SECONDS
        while not _try_lock(file):
            holder = _read_state(file).get("keeper", 0)
            with suppress(ProcessLookupError):  # the lock is held, so the process id is still the holder's
                if holder:
                    os.kill(holder, signal.SIGKILL if time.monotonic() > kill_deadline else signal.SIGTERM)
            time.sleep(0.2)
        previous = _read_state(file)
        with suppress(psutil.Error):  # a supervisor that was killed could not end its command
            created = start_time_since_boot(psutil.Process(previous.get("child", 0)))
            if previous.get("boot") == boot_id() and abs(created - previous.get("born", -1.0)) < 1.0:
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
    created = -1.0
    with suppress(psutil.Error):
        created = start_time_since_boot(psutil.Process(child_pid)) if child_pid else -1.0
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"keeper": os.getpid(), "child": child_pid, "born": created, "boot": boot_id()}))
    file.flush()


def _terminate_group(group_id: int) -> None:
    """Send SIGTERM to a process group, and SIGKILL to what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(group_id, number)
        until = time.monotonic() + timeouts.SERVER_TERMINATE_SECONDS
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
    """Print a line with the time in UTC."""
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Start a supervisor in the background, or run it here with --foreground. Returns the exit code."""
    options = _parse(arguments)
    state_folder().mkdir(mode=0o700, exist_ok=True)
    if options.foreground:
        Supervisor(
            options.name, options.command, options.health, options.poll_seconds, options.with_ray
        ).run()
        return 0
    command = [sys.executable, "-m", "orchestrator.cluster.node.supervisor", "--foreground"]
    command += ["--poll-seconds", str(options.poll_seconds)]
    command += ["--health", options.health] if options.health else []
    command += ["--with-ray"] if options.with_ray else []
    command += [options.name, "--", *options.command]
    log_path = state_folder() / f"{options.name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    works = not options.health or _wait_until_healthy(options.name, process, options.health)
    state = "is supervised" if works else "is supervised, and does not answer so far"
    print(f"{options.name}: {state}; its log: {log_path}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.node.supervisor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="name of the lock and the log")
    parser.add_argument("--health", metavar="URL", help="a URL that answers while the command works")
    parser.add_argument(
        "--poll-seconds", type=float, default=timeouts.HEALTH_POLL_SECONDS, help="pause between two checks"
    )
    parser.add_argument("--with-ray", action="store_true", help="end when Ray has left this machine")
    parser.add_argument("--foreground", action="store_true", help="supervise in this process")
    parser.add_argument("command", nargs="+", help="the command, after --")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
