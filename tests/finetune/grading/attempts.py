"""Programs that try to reach something outside their sandbox, and processes that they start."""

from __future__ import annotations

import time

import psutil

from orchestrator.finetune.grading.sandbox.run import ProgramLimits, ProgramResult, run

WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
"""Limits for programs that end by themselves, so wide that a busy machine does not change the result."""


def attempt(
    body: str, tests: str = "assert attempt() is None", limits: ProgramLimits = WIDE
) -> ProgramResult:
    """Run a program with a function `attempt`, which returns what it could reach, or None."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return run(f"import os, sys\ndef attempt():\n{lines}\n", tests, limits)


def assert_nothing_reached(body: str, limits: ProgramLimits = WIDE) -> None:
    result = attempt(body, limits=limits)
    assert result.passed, result.reason


def wait_for_process(mark: str) -> psutil.Process:
    """Wait for a process with `mark` in its command line."""
    for _ in range(1200):
        for process in psutil.process_iter(["cmdline"]):
            if mark in (process.info["cmdline"] or ()):
                return process
        time.sleep(0.1)
    raise AssertionError(f"no process {mark}")


def has_ended(mark: str) -> bool:
    """Return whether all processes with `mark` in their command line end within two minutes."""
    for _ in range(1200):
        if not any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
            return True
        time.sleep(0.1)
    return False
