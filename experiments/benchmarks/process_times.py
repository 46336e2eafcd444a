"""Run a command and print the CPU time of its processes by role, which shows what a study's fixed cost is.

    python experiments/benchmarks/process_times.py python experiments/lr_sensitivity.py --dry-run

The roles are those of Ray: the driver, trials, trainers' workers, Train's controllers, the broker, Ray's own
processes. They are read every --interval seconds, so CPU time after a process's last reading is missing. The
columns "first" and "last" are the seconds after the command's start at which the first process of a role
started and the last one was seen. The exit code is that of the command.

The processes of a Ray that was running before are not counted. A study joins the Ray of RAY_ADDRESS, and
also one that runs on this machine: unset RAY_ADDRESS, and end that Ray or measure on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from markdown_table import markdown_table

from orchestrator.util.command import main

_RAY_ACTOR = re.compile(r"ray::([A-Za-z]\w*)")
_RAY_DAEMONS = ("gcs_server", "raylet", "dashboard", "runtime_env", "log_monitor", "default_worker")


@dataclass
class ProcessTime:
    """The CPU time of one process; times in seconds after the start of the command."""

    role: str
    started: float
    last_seen: float
    cpu_seconds: float


def role_of(command_line: Sequence[str], name: str) -> str:
    """Return the role of a process of a study.

    Args:
        command_line: Its arguments. Ray replaces them by "ray::" and the class of the actor.
        name: Its name, which is its role if the arguments name no actor or daemon of Ray, module or script.
    """
    text = " ".join(command_line)
    if match := _RAY_ACTOR.match(text):
        return match[1]
    for part in command_line[:3]:
        if found := next((daemon for daemon in _RAY_DAEMONS if daemon in part), None):
            return found
    if "-m" in command_line[1:-1]:
        return command_line[command_line.index("-m") + 1]
    return next((Path(part).name for part in command_line[1:] if part.endswith(".py")), name)


def measure(command: Sequence[str], interval: float = 0.25) -> tuple[int, float, list[ProcessTime]]:
    """Run a command, and return its exit code, its wall time in seconds, and the CPU times of its processes.

    Args:
        command: The command; it inherits the standard streams.
        interval: Seconds between two readings.
    """
    found: dict[psutil.Process, ProcessTime] = {}
    began, began_at = time.monotonic(), time.time()
    driver = psutil.Popen(list(command))
    while driver.poll() is None:
        for process in [driver, *driver.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                arguments = process.cmdline()
                role = "driver" if process == driver else role_of(arguments, process.name())
                times, now = process.cpu_times(), time.monotonic() - began
                one = found.setdefault(process, ProcessTime(role, process.create_time() - began_at, now, 0.0))
                if arguments:  # a process that has ended, but not been waited for, has none
                    one.role = role
                one.last_seen, one.cpu_seconds = now, times.user + times.system
        time.sleep(interval)
    return driver.returncode, time.monotonic() - began, list(found.values())


def format_table(seconds: float, times: Sequence[ProcessTime]) -> str:
    """Return a table with a row for each role, and a line with the sum and the wall time."""
    by_role: dict[str, list[ProcessTime]] = defaultdict(list)
    for one in sorted(times, key=lambda one: one.started):
        by_role[one.role].append(one)
    rows = [
        [
            role,
            len(group),
            f"{sum(one.cpu_seconds for one in group):.1f}",
            f"{min(one.started for one in group):.1f}",
            f"{max(one.last_seen for one in group):.1f}",
        ]
        for role, group in by_role.items()
    ]
    total, cores = sum(one.cpu_seconds for one in times), len(os.sched_getaffinity(0))
    table = markdown_table(["role", "processes", "CPU, s", "first, s", "last, s"], rows)
    share = total / (seconds * cores)
    return f"{table}\n\n{seconds:.1f} s, {total:.1f} s of CPU: {share:.0%} of {cores} cores"


def run() -> int:
    """Run the command of the command line, print the table, and return the command's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interval", type=float, default=0.25, help="seconds between two readings")
    parser.add_argument("--out", type=Path, help="JSON file with the time of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command; give one, such as: python experiments/lr_sensitivity.py --dry-run")
    code, seconds, times = measure(options.command, options.interval)
    print(f"\n{format_table(seconds, times)}")
    if options.out is not None:
        result = {"seconds": seconds, "processes": [asdict(one) for one in times]}
        options.out.write_text(json.dumps(result) + "\n")
    return code if code >= 0 else 128 - code  # ended by a signal: as in a shell


if __name__ == "__main__":
    main(run)
