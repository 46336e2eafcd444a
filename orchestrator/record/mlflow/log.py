"""MLflow runs as a projection of the store: only the driver writes them, and they can be rebuilt any time.

A study is an experiment of the same name with one parent run; its configurations are child runs. There is one
experiment per study because MLflow's charts and tables show an experiment: they show the curves and
parameters of this study only, and several experiments can still be selected together.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record.mlflow import run_content
from orchestrator.record.mlflow.tracking_uri import find_damage, sqlite_path
from orchestrator.record.schema import Record
from orchestrator.util import atomic_files
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACTS_FOLDER = "mlflow-artifacts"
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
# Codes of errors that the same request would cause again.
_PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
_MLFLOW_ENVIRONMENT = {
    # MLflow repeats a failed request for minutes, also `create_run`, which makes two runs if only the answer
    # was lost. Our callers try again themselves, after reading which runs exist.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackingUnavailableError(Exception):
    """MLflow's server or database does not answer. The records are in the store."""


class TrackingDamagedError(TrackingUnavailableError):
    """MLflow's SQLite file is damaged and must be rebuilt from the store."""


@dataclass
class _ChildRun:
    run_id: str
    record_version: str
    is_complete: bool
    latest_metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric."""


@dataclass
class _StudyRun:
    experiment_id: str
    parent_run_id: str
    children: dict[str, _ChildRun]


class MlflowLogger:
    """Writer of studies and records to MLflow.

    Every method raises TrackingUnavailableError when MLflow does not answer. A later call first reads what
    MLflow has.

    Args:
        tracking_uri: The tracking URI. Artifacts are in a folder beside a SQLite file, or where the server
            keeps them.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._database = sqlite_path(tracking_uri)
        self._artifact_root = self._database.parent / ARTIFACTS_FOLDER if self._database else None
        self._study_descriptions: dict[str, tuple[str, Mapping[str, str]]] = {}
        self._studies: dict[str, _StudyRun] = {}

    def ensure_study(self, name: str, question: str, tags: Mapping[str, str] | None = None) -> str:
        """Create the study's parent run if it is missing, set it RUNNING, and set its tags.

        Args:
            name: Name of the study.
            question: The study's question, which becomes the run's note.
            tags: More tags.

        Returns:
            The id of the parent run.
        """
        self._study_descriptions[name] = (question, dict(tags or {}))
        with self._convert_errors():
            self._studies[name] = self._open_study(name)
            return self._studies[name].parent_run_id

    def log_records(
        self,
        study: str,
        records: Iterable[Record],
        reused: Set[str] = frozenset(),
        adapters: Path | None = None,
    ) -> int:
        """Write the child run of each record, if it is missing or differs. Call `ensure_study` first.

        There is one child for each study and fingerprint. A complete one is left as it is, and one that a
        killed driver left incomplete is completed. A child of an older record (stopped, now finished) is
        replaced, and so is one with other last values than the record (after a damaged database).

        Args:
            study: Name of the study.
            records: The records.
            reused: Fingerprints whose new child gets the tag `reused_from`.
            adapters: A folder with adapters in subfolders named by fingerprints, which are logged as artifact
                "adapter".

        Returns:
            The number of children that were written.
        """
        if study not in self._study_descriptions:
            raise ValueError(f"call ensure_study({study!r}) first")
        written = 0
        for record in records:
            with self._convert_errors():
                if study not in self._studies:
                    self._studies[study] = self._open_study(study)
                adapter = adapters / record.fingerprint if adapters else None
                written += self._log_record(study, record, record.fingerprint in reused, adapter)
        return written

    def finish_study(
        self, parent_run_id: str, status: str = "FINISHED", report_files: Sequence[Path] = ()
    ) -> None:
        """End the parent run of a study.

        Args:
            parent_run_id: The run, as `ensure_study` returned it.
            status: FINISHED, FAILED or KILLED.
            report_files: Files to log as artifacts of the run.
        """
        with self._convert_errors():
            for path in report_files:
                self._client.log_artifact(parent_run_id, str(path))
            self._client.set_terminated(parent_run_id, status)

    def _log_record(self, study: str, record: Record, reused: bool, adapter: Path | None) -> bool:
        study_run = self._studies[study]
        child = study_run.children.get(record.fingerprint)
        if child is not None and not _is_up_to_date(child, record):
            self._delete_run(child.run_id)
            del study_run.children[record.fingerprint]
            child = None
        if child is not None and child.is_complete:
            return False
        start, end = run_content.time_range(record)
        if child is None:
            tags = run_content.tags(record, study, study_run.parent_run_id, reused)
            run = self._client.create_run(study_run.experiment_id, start, tags, run_content.run_name(record))
            child = _ChildRun(run.info.run_id, tags["record"], is_complete=False)
            study_run.children[record.fingerprint] = child
        metrics, params = run_content.metrics(record), run_content.params(record)
        while metrics or params:
            self._client.log_batch(child.run_id, metrics[:_METRICS_PER_CALL], params[:_PARAMS_PER_CALL])
            metrics, params = metrics[_METRICS_PER_CALL:], params[_PARAMS_PER_CALL:]
        self._client.log_inputs(child.run_id, run_content.datasets(record))
        if adapter is not None and adapter.is_dir():
            self._client.log_artifacts(child.run_id, str(adapter), "adapter")
        self._client.set_terminated(child.run_id, run_content.STATUS[record.state], end)
        child.is_complete, child.latest_metrics = True, run_content.latest_metrics(record)
        return True

    def _open_study(self, name: str) -> _StudyRun:
        """Find or create the study's experiment and parent run, and read which children exist."""
        from mlflow.entities import RunTag

        question, tags = self._study_descriptions[name]
        tags = {"study": name, "role": "study", run_content.NOTE_TAG: question, **tags}
        experiment = self._ensure_experiment(name)
        parent, children = "", dict[str, _ChildRun]()
        for run in self._search_runs(experiment):
            run_tags = run.data.tags
            if run_tags.get("role") == "study":
                parent = parent or run.info.run_id
            elif run_tags.get("study") == name and "fingerprint" in run_tags:
                if run_tags["fingerprint"] in children:  # two drivers wrote at once; the older run stays
                    self._delete_run(run.info.run_id)
                    continue
                complete = run.info.status in ("FINISHED", "FAILED")
                child = _ChildRun(run.info.run_id, run_tags.get("record", ""), complete, run.data.metrics)
                children[run_tags["fingerprint"]] = child
        if parent:
            self._client.log_batch(parent, tags=[RunTag(key, value) for key, value in tags.items()])
            self._client.update_run(parent, "RUNNING")
        else:
            parent = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        return _StudyRun(experiment, parent, children)

    def _ensure_experiment(self, name: str) -> str:
        """Return the id of the study's experiment, which is created if it is missing."""
        from mlflow import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = (self._artifact_root / name).resolve().as_uri() if self._artifact_root else None
            try:
                return self._client.create_experiment(name, location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._ensure_experiment(name)  # another driver has just created it
        if found.lifecycle_stage == "deleted":  # its name cannot be used again until it is purged
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _search_runs(self, experiment: str) -> Iterator[Run]:
        """Yield all runs that are not deleted, oldest first."""
        token = None
        while True:
            page: Sequence[Run] = self._client.search_runs(
                [experiment], order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
            )
            yield from page
            token = page.token  # type: ignore[attr-defined]
            if not token:
                return

    @cached_property
    def _client(self) -> MlflowClient:
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        # Errors are raised, and the caller reports them; messages about migrations help nobody.
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        if self._database is not None:
            _create_database(self._database)
        return MlflowClient(self.tracking_uri, self.tracking_uri)

    def _delete_run(self, run_id: str) -> None:
        """Delete a child run, in a database permanently, with its artifacts.

        MLflow's client only marks a run as deleted. `_hard_delete_run`, which `mlflow gc` uses, removes it. A
        server does not offer that: the marked run stays there until `mlflow gc` is run.
        """
        self._client.delete_run(run_id)
        store = self._client._tracking_client.store
        if hasattr(store, "_hard_delete_run"):
            store._hard_delete_run(run_id)
            if self._artifact_root is not None:
                for folder in self._artifact_root.glob(f"*/{run_id}"):
                    shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A request whose answer was lost may have been executed: the next call reads what exists.
            self._studies.clear()
            uri = redact_secrets(self.tracking_uri)
            if self._database is not None and (why := find_damage(self._database, every_page=True)):
                raise TrackingDamagedError(f"{uri}: the file is damaged ({why})") from error
            if _is_unavailable(error):
                raise TrackingUnavailableError(redact_secrets(f"{uri}: {_first_line(error)}")) from error
            raise


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text; for SQLAlchemy, of the error of the database itself."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "orig"):
        cause = cause.__cause__
    text = str(getattr(cause, "orig", None) or error) or type(error).__name__
    return text.splitlines()[0]


def _is_up_to_date(child: _ChildRun, record: Record) -> bool:
    """Return whether a child belongs to this record and, if complete, has the record's last values."""
    if child.record_version != run_content.record_version(record):
        return False
    wanted = run_content.latest_metrics(record) if child.is_complete else {}
    return all(child.latest_metrics.get(key) == value for key, value in wanted.items())


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
