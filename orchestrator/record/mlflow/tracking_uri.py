"""Where MLflow keeps its runs: the default, and a check that costs seconds at most. Imports no MLflow."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

from orchestrator.record.store import Store
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.redaction import REDACTED, redact_secrets

DATABASES = ("postgresql", "mysql", "mssql")
SCHEMES = ("sqlite", "http", "https", *DATABASES)


def configured_uri(option: str | None) -> str:
    """What is typed, else MLflow's own variable; empty: neither."""
    return option or os.environ.get("MLFLOW_TRACKING_URI", "")


def default_uri(store: Store) -> str:
    """A SQLite file in the store."""
    return f"sqlite:///{store.root.resolve() / 'mlflow.db'}"


def resolve_uri(option: str | None, store: Store) -> str:
    """Where a study's runs go. Raises BadInput as `check_uri` does."""
    uri = configured_uri(option) or default_uri(store)
    try:
        check_uri(uri)
    except UsageError as error:
        if option or not configured_uri(None):
            raise
        said = str(error).replace("--tracking-uri", "MLFLOW_TRACKING_URI")
        raise UsageError(said.replace("leave the option out", "unset the variable")) from None
    return uri


def study_uri(stored_uri: str, store: Store) -> str:
    """Where a study's runs are, by what its file keeps: without a password, which MLflow's variable may
    have."""
    variable = configured_uri(None)
    return variable if variable and redact_uri(variable) == stored_uri else stored_uri or default_uri(store)


def sqlite_path(uri: str) -> Path | None:
    """The file behind a sqlite URI; None for another scheme. Three slashes: relative, four: absolute."""
    return Path(uri.split("?")[0].removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def find_damage(database: Path, every_page: bool = False) -> str:
    """Return what is wrong with a SQLite file.

    Args:
        database: the file; it need not exist.
        every_page: read the whole file. Otherwise only the header, the size and the schema are read, which
            takes no time and finds a file that was cut or is no database.

    Returns:
        SQLite's message in one line; empty if the file is whole, missing, or cannot be read now (locked).
    """
    uri = f"file:{quote(str(database.resolve()))}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, timeout=0, uri=True)) as opened:
            opened.execute("select count(*) from sqlite_master").fetchone()
            found = opened.execute("pragma quick_check(1)").fetchone()[0] if every_page else "ok"
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits of an extended code are details
        return str(error) if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""
    return "" if found == "ok" else " ".join(found.split())


def redact_uri(uri: str) -> str:
    """The URI for a message or a file: without its password."""
    return redact_secrets(uri)


def check_uri(uri: str) -> None:
    """Raises BadInput when `uri` is malformed, lacks its password, its server does not answer, or its file
    cannot be written or is damaged."""
    if REDACTED in uri:
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: passwords are kept nowhere; give the option with its own again"
        )
    scheme, colon, rest = uri.partition("://")
    scheme = scheme.split("+")[0]  # postgresql+psycopg2
    if not colon or scheme == "file":
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: must start with sqlite:///, http://, https:// or a database's "
            f"scheme; say {_suggest_uri(rest or uri)}"
        )
    if scheme not in SCHEMES:
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: unknown scheme {scheme!r}. {suggest_nearest(scheme, SCHEMES)}"
        )
    if scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in DATABASES:
        _run_with_timeout(uri, lambda: _check_database(uri))
    else:
        _check_host(uri)
        _run_with_timeout(uri, lambda: _check_health(uri))


def _suggest_uri(uri: str) -> str:
    head, _, tail = uri.partition(":")
    if head and tail.split("/")[0].isdigit():
        return f"http://{uri}"
    return f"sqlite:///{Path(tail or head or 'mlflow').with_suffix('.db')}"


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None or not path.name:
        raise UsageError(f"--tracking-uri {redact_uri(uri)!r}: names no file; say sqlite:///folder/mlflow.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        with suppress(FileNotFoundError), path.open("r+b"):
            pass
    except OSError as error:
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: the file and its folder must be writable "
            f"({error.strerror or error}); name another file"
        ) from error
    if why := find_damage(path):
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: the file is damaged ({why}); "
            "name another file, or, if studies of this --output log to it, have it made again from the "
            "records: python -m orchestrator sync --rebuild, with the same --output and --store"
        )


def _check_host(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        fine = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or an unfinished [IPv6] address
        fine = False
    if not fine:
        raise UsageError(f"--tracking-uri {redact_uri(uri)!r}: must be like http://host:5000")


def _check_health(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=timeouts.TRACKING_SERVER_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # below, it is there: it wants a login, or a proxy hides /health
            raise
        error.close()


def _check_database(uri: str) -> None:
    from sqlalchemy import create_engine

    create_engine(uri).connect().close()


def _run_with_timeout(uri: str, attempt: Callable[[], None]) -> None:
    """Runs `attempt` in a thread: looking up a name or connecting may block longer than any timeout says."""
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            attempt()
            ended.append(None)
        except Exception as error:  # whatever it is, it becomes the user's one line
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeouts.TRACKING_SERVER_SECONDS + 1)
    error = ended[0] if ended else TimeoutError("no answer in time")
    if isinstance(error, ModuleNotFoundError):
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: needs the Python package {error.name!r}; install it"
        )
    if error is not None:
        plain = isinstance(error, urllib.error.HTTPError)  # its `reason` lacks the number
        reason = str((not plain and getattr(error, "reason", None)) or error or type(error).__name__)
        raise UsageError(
            f"--tracking-uri {redact_uri(uri)!r}: cannot be reached ({redact_uri(reason.splitlines()[0])}); "
            "start that server or leave the option out"
        ) from error
