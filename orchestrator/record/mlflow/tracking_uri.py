"""MLflow tracking URIs: the default, and a check that takes seconds at most and imports no MLflow."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.record.store import Store
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.redaction import REDACTED, redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path, with_full_path

DATABASES = ("postgresql", "mysql", "mssql")
SCHEMES = ("sqlite", "http", "https", *DATABASES)


def configured_uri(option: str | None) -> str:
    """Return --tracking-uri, else MLFLOW_TRACKING_URI; empty if neither is set.

    The path of a SQLite file is completed, because the URI is stored with the study.
    """
    return with_full_path(_typed_uri(option))


def _typed_uri(option: str | None) -> str:
    return option or os.environ.get("MLFLOW_TRACKING_URI", "")


def default_uri(store: Store) -> str:
    """Return the URI of the SQLite file in the store."""
    return f"sqlite:///{store.root.resolve() / 'mlflow.db'}"


def resolve_uri(option: str | None, store: Store) -> str:
    """Return the tracking URI of a new study, after checking it.

    Args:
        option: The value of --tracking-uri, if given.
        store: The store, for the default.

    Raises:
        UsageError: The URI cannot be used; see `check_uri`.
    """
    uri = _typed_uri(option) or default_uri(store)
    try:
        check_uri(uri)
    except UsageError as error:
        if option or not _typed_uri(None):
            raise
        message = str(error).replace("--tracking-uri", "MLFLOW_TRACKING_URI")
        raise UsageError(message.replace("leave the option out", "unset the variable")) from None
    return with_full_path(uri)


def study_uri(stored_uri: str, store: Store) -> str:
    """Return the tracking URI of a study.

    Args:
        stored_uri: The URI in the study's file, without a password. If MLFLOW_TRACKING_URI is the same URI
            with a password, that one is returned.
        store: The store, for the default.
    """
    variable = configured_uri(None)
    if variable and redact_secrets(variable) == stored_uri:
        return variable
    return stored_uri or default_uri(store)


def find_damage(database: Path, every_page: bool = False) -> str:
    """Check a SQLite file for damage.

    Args:
        database: The file; it need not exist.
        every_page: Read the whole file. Otherwise only header, size and schema are read, which is fast and
            finds a file that was cut or is no database.

    Returns:
        SQLite's message in one line; empty if the file is whole, missing, or locked.
    """
    uri = f"{database.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, timeout=0, uri=True)) as opened:
            opened.execute("select count(*) from sqlite_master").fetchone()
            found = opened.execute("pragma quick_check(1)").fetchone()[0] if every_page else "ok"
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits of an extended code are details
        return str(error) if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""
    return "" if found == "ok" else " ".join(found.split())


def check_uri(uri: str) -> None:
    """Check a tracking URI.

    Raises:
        UsageError: The URI is malformed or lacks its password, its server does not answer, or its file cannot
            be written or is damaged.
    """
    if REDACTED in uri:
        raise _refusal(uri, "passwords are not stored; give the option with the password")
    scheme, colon, rest = uri.partition("://")
    scheme = scheme.split("+")[0]  # postgresql+psycopg2
    if not colon or scheme == "file":
        start = "must start with sqlite:///, http://, https:// or a database's scheme"
        raise _refusal(uri, f"{start}; take {_suggest_uri(rest or uri)}")
    if scheme not in SCHEMES:
        raise _refusal(uri, f"unknown scheme {scheme!r}. {suggest_nearest(scheme, SCHEMES)}")
    if scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in DATABASES:
        _run_with_timeout(uri, _check_database)
    elif not _has_host(uri):
        raise _refusal(uri, "must be like http://host:5000, with %2F for a slash in a password")
    else:
        _run_with_timeout(uri, _check_health)


def _refusal(uri: str, problem: str) -> UsageError:
    return UsageError(f"--tracking-uri {redact_secrets(uri)!r}: {problem}")


def _suggest_uri(uri: str) -> str:
    head, _, tail = uri.partition(":")
    if head and tail.split("/")[0].isdigit():
        return f"http://{uri}"
    return f"sqlite:///{Path(tail or head or 'mlflow').with_suffix('.db')}"


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None or not path.name:
        raise _refusal(uri, "names no file; take sqlite:///folder/mlflow.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        with suppress(FileNotFoundError), path.open("r+b"):
            pass
    except OSError as error:
        problem = f"the file and its folder must be writable ({error.strerror or error})"
        raise _refusal(uri, f"{problem}; name another file") from error
    if why := find_damage(path):
        remedy = (
            "name another file, or, if studies of this --output log to it, create it again from the records: "
            "python -m orchestrator sync --rebuild, with the same --output and --store"
        )
        raise _refusal(uri, f"the file is damaged ({why}); {remedy}")


def _has_host(uri: str) -> bool:
    """Return whether a URI has a host and a valid port, because errors of urllib would show a wrong one."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or an unfinished [IPv6] address
        return False


def _check_health(uri: str) -> None:
    parts = urlsplit(uri)
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # urllib takes no password
    try:
        urllib.request.urlopen(
            f"{server.rstrip('/')}/health", timeout=timeouts.TRACKING_SERVER_SECONDS
        ).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # with a lower code it is up: it requires a login, or a proxy hides /health
            raise
        error.close()


def _check_database(uri: str) -> None:
    from sqlalchemy import create_engine

    create_engine(uri).connect().close()


def _run_with_timeout(uri: str, attempt: Callable[[str], object]) -> None:
    """Call `attempt(uri)` in a thread, because a look-up of a name may block beyond any time-out."""
    answer = Future[object]()

    def run() -> None:
        try:
            answer.set_result(attempt(uri))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer.result(timeouts.TRACKING_SERVER_SECONDS + 1)
    except ModuleNotFoundError as error:
        raise _refusal(uri, f"needs the Python package {error.name!r}; install it") from None
    except Exception as error:  # any error becomes one line for the user
        reason = redact_secrets(str(error) or "no answer in time").splitlines()[0]
        remedy = "start that server, name one as in http://host:5000, or leave the option out"
        raise _refusal(uri, f"cannot be reached ({reason}); {remedy}") from error
