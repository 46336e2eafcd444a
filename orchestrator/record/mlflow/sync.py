"""Rebuilding of a store's projections: the Parquet files, and the MLflow runs of every study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrator.record.mlflow.adapter_models import model_tags
from orchestrator.record.mlflow.connection import TrackingDamagedError
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.mlflow.rebuild import archive_databases
from orchestrator.record.mlflow.tracking_uri import check_uri, study_uri
from orchestrator.record.parquet import write_parquet
from orchestrator.record.schema import Record
from orchestrator.record.scratch import is_locked
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, REPORT_FILES, StudyFile, read_studies
from orchestrator.record.trackers.tracker import TrackingUnavailableError
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path


def sync_projections(
    store: Store,
    output: Path,
    tracking_uri: str | None,
    notify: Callable[[str], None],
    rebuild: bool = False,
    describe: Callable[[StudyFile, Sequence[Record]], tuple[str, Mapping[str, float]]] = lambda *_: ("", {}),
) -> int:
    """Write the Parquet files and the MLflow runs again from the records.

    The adapters that the store keeps for a study become logged models. A running study's runs are not
    touched.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        tracking_uri: MLflow's tracking URI for all studies; None: the URI in each study's file.
        notify: Called with one line of text for each file and study.
        rebuild: Whether to move SQLite files away first, so that they are created again.
        describe: Function of a study and its records. It returns the study's description in Markdown, and the
            metrics of the study's own run.

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
    path = write_parquet(store, output)
    notify(f"{path}: {len(store.states())} records")
    logs = {uri: MlflowLogger(uri) for uri in set(uris.values())}
    for name, (folder, study) in studies.items():
        if is_locked(folder / LOCK_FILE):
            notify(f"{name}: is running and logs its runs itself; left as it is")
            continue
        try:
            report = [file for each in REPORT_FILES if (file := folder / each).exists()] if rebuild else []
            notify(_sync_study(store, folder, study, logs[uris[name]], report, describe))
        except TrackingDamagedError as damaged:
            notify(f"{study.name}: MLflow cannot be used ({damaged}); run this command again with --rebuild")
            return 1
        except TrackingUnavailableError as down:
            notify(f"{study.name}: MLflow does not answer ({down}); run this command again when it does")
            return 1
    return 0


def _sync_study(
    store: Store,
    folder: Path,
    study: StudyFile,
    log: MlflowLogger,
    report: Sequence[Path],
    describe: Callable[[StudyFile, Sequence[Record]], tuple[str, Mapping[str, float]]],
) -> str:
    log.ensure_study(study.name, study.question, {"command": study.command})
    found = [record for record in map(store.get, study.configurations) if record is not None]
    records = [study.rename(record) for record in found]
    num_written = log.log_records(study.name, records, frozenset(study.reused))
    status = "FINISHED" if len(records) == len(study.configurations) else "KILLED"
    description, metrics = describe(study, records) if records else ("", {})
    models = model_tags(store, folder.parent, study, records)
    if is_locked(folder / LOCK_FILE):  # logging the records may take long
        return f"{study.name}: has been started meanwhile and logs its runs itself"
    log.finish_study(study.name, status, report, description, metrics, models)
    return (
        f"{study.name}: {len(records)} of {len(study.configurations)} configurations in "
        f"{redact_secrets(log.tracking_uri)}, {num_written} of them written now"
    )
