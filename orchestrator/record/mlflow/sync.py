"""Rebuilding of a store's projections: Parquet, and the MLflow runs of every study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.record.mlflow.log import MlflowLogger, TrackingDamagedError, TrackingUnavailableError
from orchestrator.record.mlflow.rebuild import archive_databases
from orchestrator.record.mlflow.tracking_uri import check_uri, sqlite_path, study_uri
from orchestrator.record.parquet import write_parquet
from orchestrator.record.store import Store
from orchestrator.record.study_file import REPORT_FILES, StudyFile, read_studies
from orchestrator.util.redaction import redact_secrets


def sync_projections(
    store: Store, output: Path, tracking_uri: str | None, notify: Callable[[str], None], rebuild: bool = False
) -> int:
    """Write Parquet and MLflow again from the records.

    Adapters that the store keeps are logged with the child runs that are written now.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        tracking_uri: MLflow URI for all studies; None: the URI in each study's file.
        notify: Called with one line for each file and study.
        rebuild: First move SQLite files away, so that they are created again.

    Returns:
        Exit code: 0, or 1 if MLflow stopped answering.

    Raises:
        UsageError: A tracking URI cannot be used, or nothing can be rebuilt now.
    """
    studies = read_studies(output)
    uris = {
        name: tracking_uri or study_uri(study.tracking_uri, store) for name, (_, study) in studies.items()
    }
    for uri in set(uris.values()):
        if not (rebuild and sqlite_path(uri)):  # the logger creates a file again
            check_uri(uri)
    for folder in archive_databases(studies, uris) if rebuild else ():
        old = folder.name.rpartition(".")[0]
        notify(f"{folder}: the old {old}; delete it unless you have logged runs of your own there")
    path = write_parquet(store)
    notify(f"{path}: {len(store.states())} records")
    logs = {uri: MlflowLogger(uri) for uri in set(uris.values())}
    for name, (folder, study) in studies.items():
        try:
            report = [file for each in REPORT_FILES if (file := folder / each).exists()] if rebuild else []
            notify(_sync_study(store, study, logs[uris[name]], report))
        except TrackingDamagedError as damaged:
            notify(f"{study.name}: MLflow cannot be used ({damaged}); run this command again with --rebuild")
            return 1
        except TrackingUnavailableError as down:
            notify(f"{study.name}: MLflow does not answer ({down}); run this command again when it does")
            return 1
    return 0


def _sync_study(store: Store, study: StudyFile, log: MlflowLogger, report: Sequence[Path]) -> str:
    parent = log.ensure_study(study.name, study.question, {"command": study.command})
    num_records = num_written = 0
    for record in filter(None, map(store.get, study.configurations)):
        num_written += log.log_records(study.name, [record], frozenset(study.reused), store.adapters)
        num_records += 1
    log.finish_study(parent, "FINISHED" if num_records == len(study.configurations) else "KILLED", report)
    return (
        f"{study.name}: {num_records} of {len(study.configurations)} configurations in "
        f"{redact_secrets(log.tracking_uri)}, {num_written} of them written now"
    )
