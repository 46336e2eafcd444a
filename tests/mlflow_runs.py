"""Helpers of the tests that look at MLflow's runs or halt a process that writes them."""

from __future__ import annotations

import multiprocessing
import threading
from itertools import count
from multiprocessing.synchronize import Event

from mlflow import MlflowClient
from mlflow.entities import Run
from sqlalchemy import event
from sqlalchemy.engine import Engine


def runs_of(uri: str, study: str) -> tuple[Run, dict[str, Run]]:
    """Return the study's run, and the lanes' runs by fingerprint. Check that none exists twice."""
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name(study).experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    (parent,) = [r for r in runs if r.data.tags.get("role") == "study"]
    children = [r for r in runs if "fingerprint" in r.data.tags]
    by_fingerprint = {r.data.tags["fingerprint"]: r for r in children}
    assert len(by_fingerprint) == len(children) == len(runs) - 1
    for child in children:
        assert "mlflow.parentRunId" not in child.data.tags, "MLflow's page would hide it below its parent"
        assert child.data.tags["study"] == study
    return parent, by_fingerprint


PROCESSES = multiprocessing.get_context("spawn")


def stop_at(statement: str, times: int, stopped: Event) -> None:
    """Set `stopped` and halt this process before the `times`-th statement that begins with `statement`."""
    numbers = count(1)

    @event.listens_for(Engine, "before_cursor_execute")
    def stop(connection: object, cursor: object, text: str, *_: object) -> None:
        if text.startswith(statement) and next(numbers) == times:
            stopped.set()
            threading.Event().wait()
