"""Runs a study as a user does, in a process of its own, and looks at what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

# Eight lanes, long enough for something to happen to each of them.
EIGHT = ("--variants", "lora", "--seeds", "4", "--learning-rates", "3e-3", "1e-2", "--steps", "600")
# Ray's core says it by itself on a machine without a route to outside.
_RAYS_ASIDE = re.compile(r"^.*network_util\.cc:\d+\] Failed to determine local IP .*\n", re.MULTILINE)
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def start(
    output: Path,
    *arguments: str,
    address: str | None = None,
    cwd: Path | None = None,
    script: str = "lr_sensitivity.py",
) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"COLUMNS": "80"}
    if address:
        environment["RAY_ADDRESS"] = address
    return subprocess.Popen(
        [sys.executable, str(EXPERIMENTS / script), "--dry-run", "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"the study did not end within {timeout} s:\n{out}\n{err}") from None
    return process.returncode, out, _RAYS_ASIDE.sub("", err)


def run(
    output: Path,
    *arguments: str,
    address: str | None = None,
    cwd: Path | None = None,
    script: str = "lr_sensitivity.py",
) -> tuple[int, str, str]:
    return end(start(output, *arguments, address=address, cwd=cwd, script=script))


def slowness() -> float:
    """How many times longer than alone a study takes now: what is promised within ten seconds is promised on
    a machine without other work. Alone it keeps about two processes a core busy."""
    return max(1.0, os.getloadavg()[0] / (2 * len(os.sched_getaffinity(0))))


def wait_for(what: Callable[[], bool], seconds: float, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds * slowness()
    while not what():
        assert process is None or process.poll() is None, "the study ended first: " + "\n".join(
            end(process)[1:]
        )
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.1)


def finals(output: Path) -> int:
    return sum(state in ("finished", "diverged") for state in Store(output / "store").states().values())


def records(output: Path) -> dict[str, Record]:
    return {record.fingerprint: record for record in Store(output / "store").records()}


def course(record: Record) -> tuple[Any, ...]:
    """All that a configuration decides: the same to the bit whatever happened while it was trained."""
    curve = [(step.step, step.loss, step.gradient_norm) for step in record.curve]
    return record.state, record.steps, curve, [(e.step, e.split, e.scores) for e in record.evaluations]


def log(output: Path) -> str:
    """What the study in this folder has said so far."""
    return "".join(path.read_text() for path in output.glob("*/study.log"))


def half_trained(output: Path, at_most: int) -> set[str]:
    """Those that have no final record, and a checkpoint after `at_most` steps or less."""
    store = Store(output / "store")
    steps: dict[str, int] = {}
    for path in store.checkpoints.glob("*/*/*.safetensors"):
        fingerprint, step = path.parts[-3], int(path.stem.rpartition("-")[2])
        steps[fingerprint] = max(steps.get(fingerprint, 0), step)
    return {f for f, step in steps.items() if step <= at_most and store.meets(f) is None}


def rays() -> set[int]:
    """Processes of any Ray on this machine."""
    found = set()
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if process.status() != psutil.STATUS_ZOMBIE and any(
            w in line for w in ("raylet", "gcs_server", "ray::")
        ):
            found.add(process.pid)
    return found


def titled(title: str, below: psutil.Process | None = None) -> list[psutil.Process]:
    """Ray's processes of this name (ray::NAME), the oldest first."""
    found = []
    for process in (below or psutil.Process()).children(recursive=True):
        try:
            if f"ray::{title}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def _runs(output: Path, study: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study)
    return client, list(client.search_runs([experiment.experiment_id], max_results=10_000))


def children(output: Path, study: str) -> list[tuple[str, str]]:
    """(fingerprint, status) of every MLflow child of the study."""
    runs = _runs(output, study)[1]
    return [(r.data.tags["fingerprint"], r.info.status) for r in runs if "fingerprint" in r.data.tags]


def parents(output: Path, study: str) -> list[str]:
    """Status of the study's parent runs: one is right."""
    return [r.info.status for r in _runs(output, study)[1] if "fingerprint" not in r.data.tags]


def artifacts(output: Path, study: str) -> set[str]:
    """What the parent run keeps."""
    client, runs = _runs(output, study)
    (parent,) = [r for r in runs if "fingerprint" not in r.data.tags]
    return {file.path for file in client.list_artifacts(parent.info.run_id)}
