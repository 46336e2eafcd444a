"""What the sandbox does beside what `tests/promises/test_11_programs.py` tests from outside."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from orchestrator.finetune.grading.programs import grade_programs
from orchestrator.finetune.grading.sandbox import run
from orchestrator.finetune.grading.sandbox.run import ProgramLimits, ProgramResult

WIDE = ProgramLimits(wall_seconds=200.0, cpu_seconds=60, memory_bytes=512 << 20)
"""Limits for programs that end by themselves, so wide that a busy machine does not change the result."""


def wait_for_process(mark: str) -> psutil.Process:
    """Wait for a process with `mark` in its command line."""
    for _ in range(1200):
        for process in psutil.process_iter(["cmdline"]):
            if mark in (process.info["cmdline"] or ()):
                return process
        time.sleep(0.1)
    raise AssertionError(f"no process {mark}")


def test_an_environment_below_tmp_is_visible_and_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        packages = Path(folder, ".venv", "packages")
        packages.mkdir(parents=True)
        (packages / "installed.py").write_text("x = 1\n")
        (packages.parents[1] / "secret").write_text("y")
        monkeypatch.setattr(sys, "prefix", str(packages.parent))
        monkeypatch.setattr(run.sysconfig, "get_path", lambda name: str(packages))
        program = f"""
import os
import installed
got = os.listdir({folder!r}) + os.listdir('/tmp')
try:
    got.append(open({str(packages)!r} + '/mine', 'w').close())
except OSError:
    pass
reached = [each for each in got if each not in ('.venv', {Path(folder).name!r})]
def attempt(): return reached or None
"""
        result = run.run(program, "assert attempt() is None", WIDE)
        assert result.passed, result.reason


def test_a_program_that_was_killed_from_outside_is_run_again() -> None:
    """When memory is short, the machine may kill one program because of another. This test kills it once."""
    mark = f"killed-{os.getpid()}"
    program = f"import os\ndef attempt(): os.spawnlp(os.P_WAIT, 'sleep', '{mark}', '1000')\n"
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(grade_programs, [(program, "assert attempt() is None")], WIDE)
        first = wait_for_process(mark)
        os.kill(first.ppid(), signal.SIGKILL)
        first.wait(timeout=120)  # Only this process: the second run may start at once, with the same mark.
        wait_for_process(mark).kill()
        assert results.result() == [ProgramResult(True, "passed")]


def test_a_program_that_kills_itself_fails_when_it_is_run_again() -> None:
    program = "import os\ndef attempt(): os.kill(os.getpid(), 9)\n"
    assert grade_programs([(program, "attempt()")], WIDE) == [ProgramResult(False, "killed")]
