"""Keep a command running: restart it when it ends or stops answering.

    python -m orchestrator.cluster.node.supervisor NAME [--health URL] [--with-ray] -- COMMAND ...

The program starts a supervising process in the background and returns at once. With --health, it returns when
the supervised command answers, or after minutes without an answer: a study that is started after `ray up`
then finds its server. A second call with the same NAME ends the former supervisor and its command and
replaces them, so that `ray up` may be repeated. The output of the command is appended to
~/.lora-orchestrator/NAME.log. With --with-ray, supervisor and command end when Ray has left this machine, for
example after `ray down` with the provider `local`, which terminates no machine.

systemd is missing in containers and on some machines. supervisord restarts a command that ends, but has no
health check, does not end with Ray, and leaves its commands running when it is killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from orchestrator.cluster.node import raylets
from orchestrator.util import timeouts

FAILURE_THRESHOLD = 3
"""Failed health checks in a row before a restart; checks without Ray before the end."""
MAX_LOG_BYTES = 20 * 2**20
"""Size above which the log is emptied at the next restart."""
LOG_VARIABLE = "LORA_SUPERVISOR_LOG"
"""Environment variable of a supervisor and all processes of its command, by which they are found."""
_SIGNALS = (signal.SIGTERM, signal.SIGCHLD)


def log_path(name: str) -> Path:
    """Return the log of this user's supervisor `name`."""
    return Path.home() / ".lora-orchestrator" / f"{name}.log"


def is_healthy(url: str) -> bool:
    """Return whether a GET of the URL succeeds in time. Uses no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError), opener.open(url, timeout=timeouts.HEALTH_POLL_SECONDS) as response:
        return response.status < 400
    return False


@dataclass
class Supervisor:
    """A supervisor of one command, until this process is told to end."""

    name: str
    """Name of the log."""
    command: list[str]
    """The command and its arguments."""
    health_url: str | None
    """A URL that answers while the command works. None: only the command's end leads to a restart."""
    with_ray: bool
    """If true, the supervisor ends when Ray has left this machine."""
    _checks_without_ray: int = 0

    def run(self) -> None:
        """Run the command until SIGTERM, or the end of Ray. The command has ended then."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # for `sigtimedwait`, which receives them
        backoff, is_stopping = timeouts.INITIAL_BACKOFF_SECONDS, False
        while not is_stopping:
            started = time.monotonic()
            child = self._start_command()
            log_line(f"{self.name} started (process {child.pid})")
            is_stopping = self._wait_for_command(child, started)
            end_processes(self.name)  # also children that outlive a dead server
            log_line(f"{self.name} ended ({child.wait()})")
            is_stable = time.monotonic() - started > timeouts.STABLE_SECONDS
            backoff = min(2 * backoff, timeouts.MAX_BACKOFF_SECONDS)
            backoff = timeouts.INITIAL_BACKOFF_SECONDS if is_stable else backoff
            is_stopping = is_stopping or signal.sigtimedwait([signal.SIGTERM], backoff) is not None

    def _start_command(self) -> subprocess.Popen[bytes]:
        log = log_path(self.name)
        with log.open("wb" if log.exists() and log.stat().st_size > MAX_LOG_BYTES else "ab") as output:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(self.name),
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS),
            )

    def _wait_for_command(self, child: subprocess.Popen[bytes], started: float) -> bool:
        """Wait until the command ends or stops answering.

        Returns:
            Whether this process is to end, after SIGTERM or the end of Ray.
        """
        has_answered, failed_checks = False, 0
        while child.poll() is None:
            received = signal.sigtimedwait(_SIGNALS, timeouts.HEALTH_POLL_SECONDS)
            if (received and received.si_signo == signal.SIGTERM) or self._has_ray_left():
                return True
            if self.health_url is None or child.poll() is not None:
                continue
            if is_healthy(self.health_url):
                has_answered, failed_checks = True, 0
            elif has_answered or time.monotonic() - started > timeouts.SERVER_STARTUP_SECONDS:
                failed_checks += 1
                if failed_checks >= FAILURE_THRESHOLD:
                    log_line(f"{self.name} does not answer at {self.health_url}: restarting it")
                    break
        return False

    def _has_ray_left(self) -> bool:
        if not self.with_ray:
            return False
        self._checks_without_ray = 0 if raylets.find_local_raylets() else self._checks_without_ray + 1
        if has_left := self._checks_without_ray >= FAILURE_THRESHOLD:
            log_line(f"Ray has left this machine: {self.name} ends")
        return has_left


def end_processes(name: str) -> None:
    """Send SIGTERM to the processes of a supervisor except this one, and SIGKILL to what is left of them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in _find_processes(name):
            with suppress(psutil.Error):
                process.send_signal(number)
        deadline = time.monotonic() + timeouts.SERVER_TERMINATE_SECONDS
        while _find_processes(name) and time.monotonic() < deadline:
            time.sleep(0.1)


def _find_processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # of another user, or dead and not reaped
            is_own = process.environ().get(LOG_VARIABLE) == str(log_path(name))
            found += [process] if is_own and process.pid != os.getpid() else []
    return found


def _environment(name: str) -> dict[str, str]:
    return {**os.environ, LOG_VARIABLE: str(log_path(name))}


def log_line(line: str) -> None:
    """Print a line with the time in UTC."""
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)


def main(arguments: list[str]) -> int:
    """Start a supervisor in the background, or run it here with --foreground. Returns the exit code."""
    options = _parse(arguments)
    name, log = options.name, log_path(options.name)
    log.parent.mkdir(mode=0o700, exist_ok=True)
    if options.foreground:
        Supervisor(name, options.command, options.health, options.with_ray).run()
        return 0
    with FileLock(log.with_suffix(".lock")), log.open("ab") as output:
        end_processes(name)
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cluster.node.supervisor", "--foreground", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(name),
            start_new_session=True,
        )
    deadline = time.monotonic() + timeouts.SERVER_STARTUP_SECONDS
    works = not options.health
    while not works and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        works = is_healthy(options.health)
    state = "is supervised" if works else "is supervised, and does not answer so far"
    print(f"{name}: {state}; its log: {log}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster.node.supervisor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="name of the log")
    parser.add_argument("--health", metavar="URL", help="a URL that answers while the command works")
    parser.add_argument("--with-ray", action="store_true", help="end when Ray has left this machine")
    parser.add_argument("--foreground", action="store_true", help="supervise in this process")
    parser.add_argument("command", nargs="+", help="the command, after --")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
