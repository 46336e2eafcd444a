"""`lora-orchestrator sync`: write the Parquet files and the MLflow runs of all studies from the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.record.mlflow import MlflowTracker
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, REPORT_FILES, StudyFile, read_studies
from orchestrator.record.tables import write_parquet
from orchestrator.record.tracker import StudyEnd, describe_error
from orchestrator.record.tracking_uri import check_uri, study_uri
from orchestrator.util.redaction import redact_secrets

Describe = Callable[[StudyFile, Sequence[Record]], tuple[str, Mapping[str, float]]]
"""Function of a study and its records that returns the study's description in Markdown and its metrics."""


def sync_projections(
    store: Store,
    output: Path,
    tracking_uri: str | None,
    notify: Callable[[str], None],
    describe: Describe = lambda *_: ("", {}),
) -> int:
    """Write the Parquet files and the MLflow runs again from the records.

    The runs of a running study are skipped. A study cannot start while this function writes its runs.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        tracking_uri: MLflow's tracking URI for all studies; None: the URI in each study's file.
        notify: Called with one line of text for the Parquet files and for each study.
        describe: Returns the description and the metrics of a study's run.

    Returns:
        Exit code: 0, or 1 if MLflow stopped answering.

    Raises:
        UsageError: A tracking URI cannot be used.
    """
    studies = read_studies(output)
    uris = {
        name: tracking_uri or study_uri(study.tracking_uri, store) for name, (_, study) in studies.items()
    }
    for uri in set(uris.values()):
        check_uri(uri)
    notify(f"{write_parquet(store, output)}: {len(store.states())} records")
    for name, (folder, study) in studies.items():
        tracker = MlflowTracker(uris[name])
        try:
            with FileLock(folder / LOCK_FILE, timeout=0):
                notify(_sync_study(store, folder, study, tracker, describe))
        except Timeout:
            notify(f"{name}: is running and logs its runs itself; skipped")
        except Exception as error:
            if not tracker.is_outage(error):
                raise
            why = describe_error(error)
            notify(f"{name}: MLflow does not answer ({why}); remove a damaged file, and run sync again later")
            return 1
    return 0


def _sync_study(
    store: Store, folder: Path, study: StudyFile, tracker: MlflowTracker, describe: Describe
) -> str:
    tracker.start(study, {})
    found = [record for record in map(store.get, study.configurations) if record is not None]
    records = [study.rename(record) for record in found]
    for record in records:
        tracker.log_record(record, record.fingerprint in study.reused)
    is_complete = len(records) == len(study.configurations)
    description, metrics = describe(study, records) if records else ("", {})
    report = tuple(file for each in REPORT_FILES if (file := folder / each).exists())
    tracker.finish(StudyEnd("FINISHED" if is_complete else "KILLED", report, description, metrics))
    uri = redact_secrets(tracker.tracking_uri)
    return f"{study.name}: {len(records)} of {len(study.configurations)} configurations in {uri}"
