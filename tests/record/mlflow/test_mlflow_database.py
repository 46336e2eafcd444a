"""MLflow's SQLite file: damaged, created by two processes at once, or by one that is killed."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing.synchronize import Event

import pytest
from mlflow import MlflowClient
from mlflow_runs import PROCESSES, runs_of, stop_at
from mlflow_server import wait

from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.trackers.tracker import TrackingUnavailableError


def test_an_unreadable_database_counts_as_unavailable(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(TrackingUnavailableError, match="not a database"):
        MlflowLogger(f"sqlite:///{tmp_path}/mlflow.db").ensure_study("a", "")


@pytest.mark.slow
def test_two_processes_that_create_the_database_at_once_share_it(tmp_path):
    """Start two interpreters, which first import everything, and let them create the database at once."""
    code = (
        "import sys, mlflow.store.tracking.sqlalchemy_store\n"
        "from pathlib import Path\n"
        "from orchestrator.record.mlflow.log import MlflowLogger\n"
        "uri, study, here = sys.argv[1:]\n"
        "Path(here).touch()\n"
        "sys.stdin.read()\n"
        "log = MlflowLogger(uri)\n"
        "log.ensure_study(study, 'why')\n"
        "log.finish_study(study)"
    )
    (work := tmp_path / "work").mkdir()
    uri, ready = f"sqlite:///{work}/mlflow.db", [tmp_path / "one", tmp_path / "two"]
    piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri, here.name, here], cwd=work, text=True, **piped)
        for here in ready
    ]
    try:
        wait(lambda: all(here.exists() for here in ready), "the processes do not start")
        for process in processes:
            process.stdin.close()
        for process in processes:
            assert (process.stdout.read(), process.stderr.read(), process.wait()) == ("", "", 0)
    finally:
        for process in processes:
            process.kill()
    names = {e.name for e in MlflowClient(uri, uri).search_experiments()}
    assert names == {"Default", "one", "two"}
    assert {f.name for f in work.iterdir()} <= {"mlflow.db", ".lock", "mlflow-artifacts"}


def _make(uri: str, stopped: Event) -> None:
    """Create the database, and halt in the middle of its migrations."""
    stop_at("UPDATE alembic_version", 10, stopped)
    MlflowLogger(uri).ensure_study("first", "")


@pytest.mark.slow
def test_a_driver_killed_while_it_creates_the_database_leaves_none(tmp_path):
    uri, stopped = f"sqlite:///{tmp_path}/mlflow.db", PROCESSES.Event()
    process = PROCESSES.Process(target=_make, args=(uri, stopped))
    process.start()
    wait(lambda: stopped.is_set() or not process.is_alive(), "the migrations do not begin")
    assert process.is_alive()
    process.kill()
    process.join()
    assert list(tmp_path.glob(".mlflow.db.new*"))
    assert not (tmp_path / "mlflow.db").exists()
    log = MlflowLogger(uri)
    log.ensure_study("second", "")
    log.finish_study("second")
    assert runs_of(uri, "second")[0].info.status == "FINISHED"
