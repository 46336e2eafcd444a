"""Ctrl-C, for real: once, twice, before Ray is there, in the report; and the command that goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study

from orchestrator.record.store import Store

NAME = "lr_sensitivity-letters-letters-base"
FOUR = ("--variants", "lora", "hira", "--seeds", "1", "--learning-rates", "3e-3", "1e-2", "--steps", "900")


def newest(output: Path) -> dict[str, int]:
    """The steps that every unfinished lane's newest checkpoint holds."""
    steps: dict[str, int] = {}
    for path in (output / "store" / "checkpoints").glob("*/*/step-*.safetensors"):
        name = path.parts[-3]
        steps[name] = max(steps.get(name, 0), int(path.stem.rpartition("-")[2]))
    return steps


def interrupt(process: subprocess.Popen[str], what: signal.Signals = signal.SIGINT) -> float:
    """As a terminal does: to the whole group of processes."""
    os.killpg(process.pid, what)
    return time.monotonic()


STARTS_RAY = """
import os, signal, threading, time
from orchestrator.schedule.cluster import connect
from orchestrator.study.command import main

def taken():
    ours = signal.getsignal(signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) is ours:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

def run():
    threading.Thread(target=taken, daemon=True).start()
    with connect():
        time.sleep(60)

main(run)
"""


def test_sigterm_while_ray_starts_is_ours() -> None:
    """Ray takes the signal while it starts, and would end the process without a word."""
    process = subprocess.run(
        [sys.executable, "-c", STARTS_RAY],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 130, process.stdout + process.stderr
    assert "interrupted; to go on: python -c" in process.stderr, process.stderr


@pytest.mark.timeout(1200)
def test_ctrl_c_saves_the_lanes_and_the_second_one_ends_at_once(output: Path) -> None:
    before = study.rays()
    # Before Ray is there.
    process = study.start(output, *FOUR)
    go_on = f"interrupted; to go on: {shlex.join(['python', *process.args[1:]])}"
    study.wait_for(lambda: (output / NAME / "study.json").exists(), 300, process)
    began = interrupt(process, signal.SIGTERM)
    code, out, err = study.end(process, timeout=60)
    took = [time.monotonic() - began]
    assert (code, err.splitlines()[-1]) == (130, go_on), out + err

    # While lanes train, all of them: they are saved where they are.
    process = study.start(output, *FOUR)
    study.wait_for(lambda: len(newest(output)) >= 2, 300, process)
    began = interrupt(process)
    code, out, err = study.end(process, timeout=60)
    took.append(time.monotonic() - began)
    assert (code, err.splitlines()[-1]) == (130, go_on), out + err
    assert "Ctrl-C: the seats save their lanes; again ends at once\n" in out
    assert re.search(r"Stopped: \d of 4 configurations are done, what is half done is kept\n", out)
    study.wait_for(lambda: study.rays() <= before, 10)
    assert study.parents(output, NAME) == ["KILLED"]
    done = study.finals(output)
    saved = newest(output)
    assert done < 4
    assert any(step % 300 for step in saved.values()), "they have been saved between their evaluations too"

    # Twice: at once, and nothing is broken.
    process = study.start(output, *FOUR)
    study.wait_for(lambda: newest(output) != saved or study.finals(output) > done, 300, process)
    interrupt(process)
    time.sleep(0.2)
    began = interrupt(process)
    code, out, err = study.end(process, timeout=60)
    took.append(time.monotonic() - began)
    assert code == 130, out + err
    assert "Traceback" not in err
    study.wait_for(lambda: study.rays() <= before, 10)

    # To the end: what is repeated is what the second Ctrl-C did not let them save.
    saved = newest(output)
    half = {f: step for f, step in saved.items() if Store(output / "store").meets(f) is None}
    waiting = 4 - study.finals(output) - len(half)
    code, out, err = study.end(study.start(output, *FOUR), timeout=400)
    assert code == 0, out + err
    counted = re.search(r"(\d+) optimizer steps of \d+ for all", out)
    assert counted
    assert int(counted[1]) == 900 * waiting + sum(900 - step for step in half.values())
    records = study.records(output)
    assert len(records) == 4
    for record in records.values():
        assert [step.step for step in record.curve] == list(range(1, 901))
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in records)
    assert study.parents(output, NAME) == ["FINISHED"]

    # In the report.
    table = output / "store" / "records.parquet"
    written = table.stat().st_mtime_ns
    process = study.start(output, *FOUR)
    study.wait_for(lambda: table.stat().st_mtime_ns != written, 300, process)
    began = interrupt(process)
    code, out, err = study.end(process, timeout=60)
    took.append(time.monotonic() - began)
    assert code in (0, 130), out + err  # it may have been over
    assert "Traceback" not in err
    assert max(took) < 10 * study.slowness(), f"from the signal to the end: {took}"
