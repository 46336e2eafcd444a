"""Ctrl-C and SIGTERM in real studies: while Ray starts, while lanes train and while the report is written.

The same command then continues the study. test_joined_cluster.py tests a second Ctrl-C, and
tests/util/test_command.py tests signals to other commands.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import study
from steps import TASK, Steps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.usefixtures("no_cluster")]

NAME = "lr_sensitivity-counted_task-letters-base"
STEPS = 200
RATES = ("--variants", "lora", "--seeds", "1", "--widen", "0", "--learning-rates", "1e-3", "3e-3", "1e-2")
THREE = (*RATES, "--task", str(TASK), "--steps", str(STEPS), "--trainers", "1", "--lanes-per-trainer", "2")

# The signal comes at the moment when Ray has replaced our signal handler with its own.
SIGTERM_WHILE_RAY_STARTS = """
import os, signal
from orchestrator.util.graceful_interrupts import interrupt_handler
set_handler = signal.signal

def and_terminate(number, handler):
    before = set_handler(number, handler)
    if number == signal.SIGTERM and handler != interrupt_handler.handle_signal:
        os.kill(os.getpid(), signal.SIGTERM)
    return before

signal.signal = and_terminate
"""

# Ctrl-C reaches the whole process group, as in a terminal.
CTRL_C_IN_THE_REPORT = """
import os, signal
from orchestrator.launch import reporting
write = reporting.write_parquet

def write_parquet(*arguments):
    os.killpg(os.getpid(), signal.SIGINT)
    write(*arguments)

reporting.write_parquet = write_parquet
"""


def go_on(process: subprocess.Popen[str]) -> str:
    """Return the last line of an interrupted study, with the command that continues it."""
    return f"interrupted; to go on: {shlex.join(['python', *process.args[1:]])}"  # type: ignore[misc, list-item]


def test_sigterm_while_ray_starts_is_ours(output: Path, tmp_path: Path) -> None:
    """Ray's own handler would end the process without a message and leave the MLflow run as RUNNING."""
    before = study.rays()
    script = study.altered(tmp_path, study.PATIENT, SIGTERM_WHILE_RAY_STARTS)
    process = study.start(output, *THREE, script=script)
    code, out, err = study.end(process)
    assert (code, err.splitlines()[-1]) == (130, go_on(process)), out + err
    assert "Traceback" not in err
    assert study.parents(output, NAME) == ["KILLED"]
    assert not study.records(output)
    study.wait_for(lambda: study.rays() <= before)


def test_ctrl_c_saves_the_lanes_and_the_same_command_goes_on(
    output: Path, tmp_path: Path, steps: Steps
) -> None:
    before = study.rays()
    steps.slow_after(0, seconds=0.2)  # the first lane does not end before the second one has begun
    process = study.start(output, *THREE, script=study.altered(tmp_path, study.PATIENT))
    study.wait_for(lambda: len(study.saved(output)) == 2, process)  # two lanes train, and one waits
    os.killpg(process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    code, out, err = study.end(process)
    assert (code, err.splitlines()[-1]) == (130, go_on(process)), out + err
    assert "Ctrl-C: the trainers save their lanes; again ends at once\n" in out
    assert "Stopped: 0 of 3 configurations are done, what is half done is kept\n" in out
    assert (output / NAME / "report.html").exists()
    study.wait_for(lambda: study.rays() <= before)
    assert study.parents(output, NAME) == ["KILLED"]
    saved = study.saved(output)
    assert len(saved) == 2
    assert sum(saved.values()) == steps.taken(), "they are saved where they are"

    # The same command trains to the end. It is interrupted in the report, which is written all the same.
    (output / NAME / "report.html").unlink()
    steps.run_free()
    script = study.altered(tmp_path, study.PATIENT, CTRL_C_IN_THE_REPORT)
    process = study.start(output, *THREE, script=script)
    code, out, err = study.end(process)
    assert (code, err.splitlines()[-1]) == (130, go_on(process)), out + err
    assert "Traceback" not in err
    counted = re.search(r"(\d+) optimizer steps of \d+ for all", out)
    assert counted, out
    assert int(counted[1]) == 3 * STEPS - sum(saved.values()), "no step is repeated"
    records = study.records(output)
    assert len(records) == 3
    for record in records.values():
        assert [step.step for step in record.curve] == list(range(1, STEPS + 1))
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in records)
    assert study.parents(output, NAME) == ["KILLED"]
    assert (output / NAME / "report.html").exists()
