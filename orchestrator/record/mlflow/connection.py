"""The connection to MLflow's server or database: its client, its errors, and the creation of a database."""

from __future__ import annotations

import logging
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from orchestrator.record.mlflow.child_run import find_models
from orchestrator.record.mlflow.tracking_uri import find_damage
from orchestrator.record.trackers.tracker import TrackingUnavailableError
from orchestrator.util import atomic_files
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS_FOLDER = "mlflow-artifacts"
# Codes of errors that a repeated request would cause again.
_PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
_MLFLOW_ENVIRONMENT = {
    # By default MLflow repeats a failed request for minutes. A repeated `create_run` makes a second run if
    # only the answer was lost. The callers of this module try again after reading which runs exist.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackingDamagedError(TrackingUnavailableError):
    """MLflow's SQLite file is damaged and must be rebuilt from the store."""


class Connection:
    """A connection to MLflow.

    Args:
        tracking_uri: The tracking URI. Artifacts are in a folder beside a SQLite file, or where the server
            keeps them.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._database = sqlite_path(tracking_uri)
        self.artifact_root = self._database.parent / ARTIFACTS_FOLDER if self._database else None
        """Folder of the artifacts beside a SQLite file; None if the server or database has its own place."""

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client. The first use imports MLflow, and creates its SQLite file if that is missing."""
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        # The callers report MLflow's errors; its log messages on database migrations are no use to a user.
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        if self._database is not None:
            _create_database(self._database)
        return MlflowClient(self.tracking_uri, self.tracking_uri)

    def delete_run(self, experiment_id: str, run_id: str) -> None:
        """Delete a run with its artifacts and its model; in a database permanently.

        MLflow's client only marks runs and models as deleted. `_hard_delete_run`, which `mlflow gc` uses,
        removes them. A server does not offer that: the marked run stays there until `mlflow gc` is run.

        Args:
            experiment_id: The experiment of the run.
            run_id: The run.
        """
        store = self.client._tracking_client.store
        removed = [run_id]
        for model in find_models(self.client, experiment_id, run_id) or ():
            self.client.delete_logged_model(model.model_id)
            if hasattr(store, "_hard_delete_logged_model"):
                store._hard_delete_logged_model(model.model_id)
                removed.append(f"models/{model.model_id}")
        self.client.delete_run(run_id)
        if hasattr(store, "_hard_delete_run"):
            store._hard_delete_run(run_id)
            if self.artifact_root is not None:
                for folder in (f for name in removed for f in self.artifact_root.glob(f"*/{name}")):
                    shutil.rmtree(folder, ignore_errors=True)

    def raise_converted(self, error: Exception) -> NoReturn:
        """Raise an error of a call to MLflow again, converted if the same call may succeed later.

        Raises:
            TrackingDamagedError: The SQLite file is damaged.
            TrackingUnavailableError: MLflow does not answer.
        """
        uri = redact_secrets(self.tracking_uri)
        if self._database is not None and (why := find_damage(self._database, every_page=True)):
            raise TrackingDamagedError(f"{uri}: the file is damaged ({why})") from error
        if _is_unavailable(error):
            raise TrackingUnavailableError(redact_secrets(f"{uri}: {_first_line(error)}")) from error
        raise error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text; for SQLAlchemy, of the error of the database itself."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "orig"):
        cause = cause.__cause__
    text = str(getattr(cause, "orig", None) or error) or type(error).__name__
    return text.splitlines()[0]


def _create_database(path: Path) -> None:
    """Create MLflow's SQLite file, complete or not at all.

    Two processes that open a new file at once break each other's migrations, and a process that is killed
    during its migrations leaves a file that no later one can open. A lock and a temporary name prevent both.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.lock_folder(path.parent):
        if path.exists():
            return
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        uri = f"sqlite:///{new}"
        MlflowClient(uri, uri).search_experiments()
        os.replace(new, path)


def _is_unavailable(error: Exception) -> bool:
    from mlflow import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return error.error_code not in _PERMANENT_ERRORS
    return isinstance(error, OSError | SQLAlchemyError)  # errors of `requests` are OSErrors
