"""Rebuilds the projections of a store: Parquet, and the MLflow runs of every study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.record.mlflow_log import MlflowLog, TrackingDown
from orchestrator.record.parquet import write_parquet
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, all_studies
from orchestrator.record.tracking_uri import check_uri, of_study, shown


def sync(store: Store, output: Path, tracking_uri: str | None, say: Callable[[str], None]) -> int:
    """Writes both projections anew and says what there is, a line each. Returns 1 when MLflow stopped
    answering on the way. Raises BadInput on a tracking URI that cannot be used.

    A study's adapters are logged where the store keeps them, with those children that have yet to be written.
    """
    path = write_parquet(store)
    say(f"{path}: {len(store.states())} records")
    logs: dict[str, MlflowLog] = {}
    for _folder, study in all_studies(output).values():
        uri = tracking_uri or of_study(study.tracking_uri, store)
        if uri not in logs:
            check_uri(uri)
            logs[uri] = MlflowLog(uri)
        try:
            say(_sync_study(store, study, logs[uri]))
        except TrackingDown as down:
            say(f"{study.name}: MLflow does not answer ({down}); run this command again when it does")
            return 1
    return 0


def _sync_study(store: Store, study: StudyFile, log: MlflowLog) -> str:
    parent = log.ensure_study(study.name, study.question, {"command": study.command})
    there = written = 0
    for fingerprint in study.configurations:
        record = store.get(fingerprint)
        if record is not None:
            folders = {fingerprint: store.adapters / fingerprint}
            written += log.log_records(study.name, [record], frozenset(study.reused), folders)
            there += 1
    log.finish_study(parent, "FINISHED" if there == len(study.configurations) else "KILLED")
    return (
        f"{study.name}: {there} of {len(study.configurations)} configurations in {shown(log.tracking_uri)}, "
        f"{written} of them written now"
    )
