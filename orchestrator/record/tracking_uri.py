"""MLflow's tracking URI: its default, its check, and the client that it opens."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record.store import Store
from orchestrator.record.tracker import describe_error
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import REDACTED, redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path, with_full_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ENVIRONMENT = {
    # By default MLflow repeats a failed request for minutes. If only the answer was lost, a repeated
    # `create_run` creates a second run. `MlflowTracker.start` is called again instead and reads the runs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def configured_uri(option: str | None) -> str:
    """Return --tracking-uri, else MLFLOW_TRACKING_URI, with the full path of a file; empty if none is set."""
    return with_full_path(option or os.environ.get("MLFLOW_TRACKING_URI", ""))


def default_uri(store: Store) -> str:
    """Return the URI of the SQLite file in the store."""
    return f"sqlite:///{store.root.resolve() / 'mlflow.db'}"


def resolve_uri(option: str | None, store: Store) -> str:
    """Return the tracking URI of a new study, and check it.

    Raises:
        UsageError: MLflow cannot use it.
    """
    uri = configured_uri(option) or default_uri(store)
    check_uri(uri, "MLFLOW_TRACKING_URI" if configured_uri(None) and not option else "--tracking-uri")
    return uri


def study_uri(stored_uri: str, store: Store) -> str:
    """Return the tracking URI of a study.

    Args:
        stored_uri: The URI in the study's file, without a password. If MLFLOW_TRACKING_URI is the same URI
            with a password, the URI with the password is returned.
        store: The store, whose SQLite file is the default.
    """
    variable = configured_uri(None)
    if variable and redact_secrets(variable) == stored_uri:
        return variable
    return stored_uri or default_uri(store)


def check_uri(uri: str, option: str = "--tracking-uri") -> None:
    """Check that MLflow can use a tracking URI, before anything is trained.

    Args:
        uri: The URI.
        option: The option or variable that set the URI, for the error.

    Raises:
        UsageError: The URI has no scheme or lacks its password, its server does not answer, or its file
            cannot be written or is damaged.
    """
    shown = f"{option} {redact_secrets(uri)!r}"
    if REDACTED in uri:
        raise UsageError(f"{shown}: passwords are not stored; give the option with the password")
    if "://" not in uri or uri.startswith("file:") or uri == "sqlite://":
        raise UsageError(f"{shown}: must be sqlite:///FILE, or a server's address such as http://host:5000")
    path = sqlite_path(uri)
    try:
        if path is None:
            connect(uri).search_experiments(max_results=1)
        elif path.exists():
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                database.execute("select count(*) from sqlite_master").fetchone()
        else:
            atomic_files.check_writable(path.parent)
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from error
    except Exception as error:  # of MLflow, SQLAlchemy, a driver that is not installed, or the disk
        if "database is locked" not in str(error):  # by a study that writes now
            raise UsageError(
                f"{shown}: {describe_error(error)}; start that server, name another one or another file, or "
                "leave it out (a damaged file: remove it, and `sync` makes it again)"
            ) from error


def connect(uri: str) -> MlflowClient:
    """Return a client. A missing SQLite file is created. The first call takes seconds to import MLflow."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # The callers report MLflow's errors; its log messages on database migrations are no use to a user.
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if (path := sqlite_path(uri)) is not None and path.name:
        _create_database(path)
    return MlflowClient(uri, uri)


def _create_database(path: Path) -> None:
    """Create MLflow's SQLite file atomically.

    Two processes that open a new file at once break each other's migrations, and a process that is killed
    during its migrations leaves a file that none can open. The lock prevents the first fault, and the
    temporary name prevents the second.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.lock_folder(path.parent):
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}", f"sqlite:///{new}").search_experiments()
            os.replace(new, path)
