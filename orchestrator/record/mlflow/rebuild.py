"""Archiving of MLflow's SQLite files, so that they are created again from the records.

    <folder>/mlflow.db, mlflow-artifacts/<study>/    what MLflow had
    <folder>/mlflow.db.old-1/                        the archive: the file, its journal, the artifacts

Everything that a study logs is a copy of its records, its adapters and its report. The old file is kept
because a user may have logged other runs to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path

from orchestrator.record.mlflow.connection import ARTIFACTS_FOLDER
from orchestrator.record.scratch import is_locked
from orchestrator.record.study_file import LOCK_FILE, StudyFile
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path

JOURNAL_SUFFIXES = ("-journal", "-wal", "-shm")
"""Suffixes of SQLite's journals, which are moved too: SQLite would apply old ones to the new database."""


def archive_databases(studies: Mapping[str, tuple[Path, StudyFile]], uris: Mapping[str, str]) -> list[Path]:
    """Move the SQLite files of these studies, and the studies' artifacts, into new folders beside them.

    Args:
        studies: Name of each study -> its folder and content.
        uris: Name of each study -> its tracking URI. URIs of servers are ignored.

    Returns:
        The new folders, one for each SQLite file that existed.

    Raises:
        UsageError: No study logs to a SQLite file, or a study that does is running.
    """
    studies_by_database: dict[Path, list[str]] = {}
    for name, uri in uris.items():
        database = sqlite_path(uri)
        if database is not None:
            studies_by_database.setdefault(database, []).append(name)
            if is_locked(studies[name][0] / LOCK_FILE):
                raise UsageError(
                    f"--rebuild: study {name!r} is running and logs to {database}; wait for its end"
                )
    if not studies_by_database:
        others = ", ".join(sorted({redact_secrets(uri) for uri in uris.values()})) or "there is no study"
        raise UsageError(
            f"--rebuild: it rebuilds SQLite files, and no study logs to one ({others}); leave it out"
        )
    return [_archive_database(file, names) for file, names in studies_by_database.items() if file.exists()]


def _archive_database(database: Path, studies: Collection[str]) -> Path:
    """Move one SQLite file and the artifacts of its studies, and return their new folder."""
    names = (database.with_name(f"{database.name}.old-{number}") for number in count(1))
    archive = next(name for name in names if not name.exists())
    archive.mkdir()
    for study in studies:
        artifacts = database.parent / ARTIFACTS_FOLDER / study
        if artifacts.is_dir():
            (archive / ARTIFACTS_FOLDER).mkdir(exist_ok=True)
            artifacts.rename(archive / ARTIFACTS_FOLDER / study)
    for journal in JOURNAL_SUFFIXES:
        file = database.with_name(database.name + journal)
        if file.exists():
            file.rename(archive / file.name)
    database.rename(archive / database.name)  # last: until then the command can be repeated
    return archive
