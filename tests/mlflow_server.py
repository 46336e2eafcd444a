"""MLflow databases made without migrations."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path


def empty_database(path: Path) -> str:
    """Write a SQLite database with MLflow's tables and no run to `path`. Return its URI.

    MLflow's migrations take seconds. They run once per test process, and each file is a copy of their result.
    Tests of the migrations themselves must not use this function.
    """
    path.write_bytes(_tables())
    return f"sqlite:///{path}"


@cache
def _tables() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
        with closing(sqlite3.connect(path)) as database:
            return database.serialize()


def wait(condition: Callable[[], object], otherwise: str, seconds: float = 240.0) -> None:
    """Wait until `condition` is true. Fail with the message `otherwise` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
