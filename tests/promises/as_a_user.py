"""Act as a user: run commands, read their output and their files, and end processes.

The tests of the promises use the command line, `import orchestrator` and the documented files only. The
program inside can therefore be rewritten without a change of these tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANG_SECONDS = float(os.environ.get("HANG_SECONDS", "900"))
"""Seconds after which a command that does not end fails its test. No result depends on the value."""

DRY_RUN = (
    *("--dry-run", "--variants", "lora", "pissa", "--learning-rates", "1e-3", "1e-2", "1e-1"),
    *("--seeds", "2", "--steps", "30", "--widen", "0"),
)
"""Arguments of the short dry run that several tests read: 12 configurations instead of 132."""

TASK = """
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults

class Mine(Task):
    floor = 0.0
    output = "teacher_forced"
    defaults = TaskDefaults(
        train_size=32, validation_size=8, test_size=8, steps=6, batch_size=8, max_length=32,
        evaluations=2, learning_rates=(1e-3,),
    )

    def examples(self, split, count):
        last = {"train": "i", "validation": "j", "test": "k"}[split]
        return [Example(f"copy {last} b c d {letter} =", "a b") for letter in "abcdefgh" * (count // 8)]
"""
"""A file of a user with a task."""


@dataclass(frozen=True)
class Result:
    """The exit status, the standard output and the standard error of a command."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


def start(*words: str | Path, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start `lora-orchestrator WORDS` as the leader of a new process group.

    Args:
        words: The arguments. If the first one is a `Path`, this Python script is started with the others.
        cwd: The working folder, in which the command creates `results/`.
        variables: Environment variables to set.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    is_script = bool(words) and isinstance(words[0], Path)
    return subprocess.Popen(
        [sys.executable, *(() if is_script else ("-m", "orchestrator")), *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"COLUMNS": "80"} | variables,
        cwd=cwd,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> Result:
    """Wait until the command ends, and return its result."""
    try:
        out, err = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"did not end within {HANG_SECONDS:g} s:\n{out}\n{err}") from None
    return Result(process.returncode, out, err)


def run(*words: str | Path, cwd: Path, **variables: str) -> Result:
    """Run `lora-orchestrator WORDS` in the folder `cwd`, and return its result; see `start`."""
    return end(start(*words, cwd=cwd, **variables))


def succeed(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed, and return its standard output."""
    result = run(*words, cwd=cwd, **variables)
    assert result.code == 0, f"{words}: {result}"
    return result.out


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `happened` returns true; fail if the command ends first."""
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert process.poll() is None or happened(), f"the command ended first: {end(process)}"
        assert time.monotonic() < deadline, f"did not happen within {HANG_SECONDS:g} s"
        time.sleep(0.1)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records in `folder/results/store`, by fingerprint.

    A record is one JSON file whose name begins with the fingerprint of its configuration (docs/results.md).
    """
    found = {}
    for path in (folder / "results" / "store" / "records").rglob("*.json"):
        found[path.name.partition(".")[0]] = json.loads(path.read_text())
    return found


def results(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that depend on its configuration only."""
    return {name: value for name, value in record.items() if name not in ("cost", "provenance", "sha256")}


def learning_rate(record: dict[str, Any]) -> float:
    """Return the learning rate of a record's configuration."""
    return float(record["configuration"]["optimizer"]["learning_rate"])


def mlflow_runs(folder: Path, study: str) -> list[Any]:
    """Return a study's MLflow runs: one with the tag `role` = `study`, and one for each configuration."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'results' / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None, f"MLflow has no experiment {study}"
    return list(client.search_runs([experiment.experiment_id], max_results=10_000))


def assert_one_finished_run_each(folder: Path, study: str, fingerprints: Iterable[str]) -> None:
    """Check that MLflow has one finished run for the study, and one for each of its configurations."""
    found = [
        (run.data.tags.get("fingerprint", "study"), run.info.status) for run in mlflow_runs(folder, study)
    ]
    assert sorted(found) == sorted((name, "FINISHED") for name in (*fingerprints, "study"))
