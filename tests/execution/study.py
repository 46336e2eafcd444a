"""Helpers that run a study as a user does, in a process of its own, and read its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cli.program import run_command
from orchestrator.execution.schedulers import lane_evaluation_steps
from orchestrator.experiments import MODULES
from orchestrator.record.schema import Evaluation, Provenance, Record
from orchestrator.record.store import Store
from orchestrator.study.grids import build_grid
from orchestrator.study.options import StudyOptions

# Ray's core prints this line on a machine without a network route to the outside.
_RAYS_ASIDE = re.compile(r"^.*network_util\.cc:\d+: Failed to determine local IP .*\n", re.MULTILINE)
# The time after which a test that hangs fails; no other result depends on it.
HANG_SECONDS = 600.0
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Lines for `altered`: a study that is told to end may then take as long as it needs on a busy machine.
PATIENT = f"""
from orchestrator.util import timeouts
timeouts.INTERRUPT_SAVE_SECONDS = timeouts.SAVE_SECONDS = timeouts.INTERRUPT_DEADLINE_SECONDS = {HANG_SECONDS}
timeouts.INTERRUPT_MLFLOW_FLUSH_SECONDS = timeouts.MLFLOW_FLUSH_SECONDS = {HANG_SECONDS}
timeouts.INTERRUPT_TIMEOUT_SECONDS = {HANG_SECONDS}
"""


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


def end(process: subprocess.Popen[str], timeout: float = HANG_SECONDS) -> tuple[int, str, str]:
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


def altered(folder: Path, *before: str) -> str:
    """Write a script that runs the lines `before` and then lr_sensitivity.py, and return its path.

    `run` and `start` accept the path as `script`. Tests use such scripts to shorten or extend time limits,
    and to act at a moment deep inside the program.
    """
    script = folder / f"altered-{uuid.uuid4().hex}.py"
    script.write_text(
        "\n".join(
            [
                *before,
                "import runpy",
                f"runpy.run_path({str(EXPERIMENTS / 'lr_sensitivity.py')!r}, run_name='__main__')",
            ]
        )
    )
    return str(script)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until `what` returns true. Fail if the study's `process` ends first, or after `HANG_SECONDS`."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        asked = time.monotonic()
        if what():
            return
        took = time.monotonic() - asked
        assert process is None or process.poll() is None or what(), "the study ended first: " + "\n".join(
            end(process)[1:]
        )
        assert time.monotonic() < deadline, f"did not happen within {HANG_SECONDS:g} s"
        time.sleep(min(max(0.1, 4 * took), 2.0))  # a query of Ray may cost as much CPU time as the study


def records(output: Path) -> dict[str, Record]:
    return {record.fingerprint: record for record in Store(output / "store").records()}


def course(record: Record) -> tuple[Any, ...]:
    """Return the results that depend on the configuration only; no disturbance of training changes them."""
    curve = [(step.step, step.loss, step.gradient_norm) for step in record.curve]
    return record.state, record.steps, curve, [(e.step, e.split, e.scores) for e in record.evaluations]


def log(output: Path) -> str:
    """Return the text of the study's log so far."""
    return "".join(path.read_text() for path in output.glob("*/study.log"))


def saved(output: Path) -> dict[str, int]:
    """Return the step of each lane's newest checkpoint, by fingerprint."""
    steps: dict[str, int] = {}
    for path in Store(output / "store").checkpoints.glob("*/*/step-*.safetensors"):
        fingerprint, step = path.parts[-3], int(path.stem.rpartition("-")[2])
        steps[fingerprint] = max(steps.get(fingerprint, 0), step)
    return steps


def rays() -> set[int]:
    """Return the ids of Ray's processes that this test process or its studies have started.

    Such a process has the temporary folder of this test process in its environment. Some processes overwrite
    their environment with a title; they are recognized by an open file in that folder.
    """
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and _is_a_ray(process):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def _is_a_ray(process: psutil.Process) -> bool:
    if not any(word in " ".join(process.cmdline()) for word in ("raylet", "gcs_server", "ray::")):
        return False
    folder = tempfile.gettempdir()
    return process.environ().get("TMPDIR") == folder or any(
        Path(file.path).is_relative_to(folder) for file in process.open_files()
    )


def titled(title: str, below: psutil.Process | None = None) -> list[psutil.Process]:
    """Return Ray's processes with this title (ray::TITLE) below this process or `below`, the oldest first."""
    found = []
    for process in (below or psutil.Process()).children(recursive=True):
        try:
            if f"ray::{title}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def _runs(output: Path, study: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study)
    return list(client.search_runs([experiment.experiment_id], max_results=10_000))


def children(output: Path, study: str) -> list[tuple[str, str]]:
    """Return the fingerprint and status of each of the study's child runs in MLflow."""
    runs = _runs(output, study)
    return [(r.data.tags["fingerprint"], r.info.status) for r in runs if "fingerprint" in r.data.tags]


def parents(output: Path, study: str) -> list[str]:
    """Return the status of each of the study's parent runs; there should be exactly one."""
    return [r.info.status for r in _runs(output, study) if "fingerprint" not in r.data.tags]


def run_here(
    output: Path, *arguments: str, address: str | None = None, script: str = "lr_sensitivity.py"
) -> int:
    """Run a script in this process, because a new process needs 10 s of CPU time for its imports alone.

    Args:
        output: The option `--output`.
        arguments: Other options.
        address: The address of the Ray cluster that trains. This process must not be connected to it yet.
            Without an address, nothing may be left to train.
        script: A file of `experiments`.

    Returns:
        The exit code.

    Raises:
        UsageError: An option is wrong. (As a command, the script prints this error and ends with code 2.)
    """
    (name,) = (name for name, module in MODULES.items() if script == f"{module}.py")
    with pytest.MonkeyPatch.context() as patch:
        command = [str(EXPERIMENTS / script), "--dry-run", "--output", str(output), *arguments]
        patch.setattr(sys, "argv", command)
        patch.setenv("COLUMNS", "80")
        if address:
            patch.setenv("RAY_ADDRESS", address)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        wakeup = signal.set_wakeup_fd(-1)
        try:
            return run_command(name, command[1:], f"python {command[0]}")
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def hold(folder: Path, store: Store, records: int, step: int) -> Path:
    """Write the task file of a study that is held, and return its path.

    A trainer is held after step `step` of a lane once the store has `records` records; see held_task.py.
    """
    folder.mkdir(exist_ok=True)
    where = {"records": str(store.records_folder), "count": records, "step": step}
    (folder / "hold.json").write_text(json.dumps(where))
    shutil.copy(Path(__file__).with_name("prompt_checkpoints.py"), folder)
    return Path(shutil.copy(Path(__file__).with_name("held_task.py"), folder))


def held(task: Path) -> bool:
    """Return whether a trainer of the study is or was held."""
    return task.with_name("held").exists()


def release(task: Path) -> None:
    """Let the held trainer continue."""
    task.with_name("released").touch()


def keep_known(options: StudyOptions, loss: float, score: float = 0.5) -> set[str]:
    """Put a finished record of each configuration that `options` ask for into the store.

    Args:
        options: The options of a grid.
        loss: The validation loss of each configuration, at each evaluation.
        score: The validation score of each configuration by the task's metric, at each evaluation.

    Returns:
        The fingerprints of the configurations.
    """
    from resolved import resolve_one_task  # `python -m tests.execution.chaos` does not find it

    store = Store(options.store_folder)
    options = replace(options, task=options.task or ("letters",), variants=options.variants or ("lora",))
    chosen, templates = resolve_one_task(options, store.bases)
    found = set()
    for configuration in build_grid(templates, chosen.learning_rates, range(options.seed_count)):
        steps, metric = lane_evaluation_steps(configuration), configuration.task.metric
        scores, others = {"loss": loss, metric: score}, {"loss": loss, metric: 0.5}
        record = Record(
            configuration.fingerprint,
            configuration,
            "finished",
            steps[-1],
            evaluations=(
                *(Evaluation(step, "validation", scores) for step in steps),
                Evaluation(steps[-1], "test", others),
            ),
            baseline_scores={"validation": others, "test": others},
            provenance=Provenance(started=1e9, ended=1e9 + 1),
        )
        assert store.put(record)
        found.add(record.fingerprint)
    return found
