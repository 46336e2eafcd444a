"""MLflow runs as a projection of the store: only the driver writes them, and they can be rebuilt any time.

A study is an experiment of the same name. Each of its configurations is a run, and the study itself is one more
run, which has the report, the verdicts and the command. No run has a parent, because MLflow's pages show nested
runs closed, and their charts leave them out. There is one experiment per study because these pages show an
experiment; several experiments can still be selected together. The experiment has a saved view (`saved_view`).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record.mlflow import run_content, saved_view
from orchestrator.record.mlflow.child_run import (
    ChildRun,
    find_models,
    is_up_to_date,
    log_in_batches,
    log_model,
    log_progress,
    missing_metrics,
    read_logged,
)
from orchestrator.record.mlflow.tracking_uri import find_damage, sqlite_path
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACTS_FOLDER = "mlflow-artifacts"
_SCORE = "validation_score"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of a new experiment. MLflow's page opens with the runs, in place of an empty list of traces."""
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
class _StudyRun:
    experiment_id: str
    run_id: str
    """The run of the study itself."""
    children: dict[str, ChildRun]
    """The runs of the configurations, by fingerprint."""
    stale_means: bool = False
    """True if a run was written since `MlflowLogger.update_means`."""


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

    def ensure_study(self, name: str, question: str, tags: Mapping[str, str] | None = None) -> None:
        """Create the study's experiment and run if they are missing, set the run RUNNING, and set its tags.

        Args:
            name: Name of the study.
            question: The study's question, which is the description until `finish_study` writes another.
            tags: More tags of the run.
        """
        self._study_descriptions[name] = (question, dict(tags or {}))
        with self._convert_errors():
            self._studies[name] = self._open_study(name)

    def view_link(self, study: str) -> str:
        """Return the address of the study's saved view; empty if MLflow has not answered yet."""
        opened = self._studies.get(study)
        return saved_view.link(redact_secrets(self.tracking_uri), opened.experiment_id) if opened else ""

    def log_records(
        self,
        study: str,
        records: Iterable[Record],
        reused: Set[str] = frozenset(),
        adapters: Path | None = None,
    ) -> int:
        """Write the run of each record, if it is missing or differs. Call `ensure_study` first.

        There is one run for each study and fingerprint. A complete one is left as it is. One that shows a lane in
        training, or that a killed driver left incomplete, is completed. The run of an older record (stopped, now
        finished) is replaced, and so is one with other values than the record (after a damaged database).

        Args:
            study: Name of the study.
            records: The records.
            reused: Fingerprints whose new run gets the tag `reused_from`.
            adapters: A folder with adapters in subfolders named by fingerprints, which are logged as models.

        Returns:
            The number of runs that were written.
        """
        written = 0
        for record in records:
            with self._convert_errors():
                adapter = adapters / record.fingerprint if adapters else None
                written += self._log_record(study, record, record.fingerprint in reused, adapter)
        return written

    def log_progress(self, study: str, progress: LaneProgress) -> None:
        """Show the start or an evaluation of a lane that is in training. Call `ensure_study` first.

        The lane's run is created if it is missing. A complete run stays as it is, because its record came first.
        """
        with self._convert_errors():
            opened = self._get_study(study)
            child = opened.children.get(progress.configuration.fingerprint)
            if child is not None and (child.is_complete or child.record_version):
                return
            now = round(time.time() * 1000)
            if child is None:
                tags = run_content.configuration_tags(progress.configuration, study)
                child = self._create_run(opened, progress.configuration, tags, now)
                log_progress(self._client, child, LaneProgress(progress.configuration), now)
            elif not progress.step:
                self._client.update_run(child.run_id, "RUNNING")  # an earlier driver has left it KILLED
            log_progress(self._client, child, progress, now)

    def finish_study(
        self,
        study: str,
        status: str = "FINISHED",
        report_files: Sequence[Path] = (),
        description: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write the saved view and the description, and end the study's run and those of lanes without a record.

        Args:
            study: Name of the study.
            status: FINISHED, FAILED or KILLED.
            report_files: Files to log as artifacts of the study's run.
            description: Verdicts and best points in Markdown; empty: the description stays as it is.
            metrics: Their numbers, which become metrics of the study's run.
        """
        from mlflow.entities import Metric, RunTag

        with self._convert_errors():
            opened, now = self._get_study(study), round(time.time() * 1000)
            self._update_means(opened)
            if description:
                question = self._study_descriptions[study][0]
                links = saved_view.markdown_links(opened.experiment_id)
                note = run_content.limit_note(f"**{question}**\n\n{links}\n\n{description}")
                self._client.set_experiment_tag(opened.experiment_id, run_content.NOTE_TAG, note)
                tags = [RunTag(run_content.NOTE_TAG, note)]
                values = [Metric(run_content.mlflow_key(k), v, now, 0) for k, v in (metrics or {}).items()]
                log_in_batches(self._client, opened.run_id, values, (), tags)
            for path in report_files:
                self._client.log_artifact(opened.run_id, str(path))
            for child in opened.children.values():
                if not child.is_complete:
                    self._client.set_terminated(child.run_id, "KILLED")
            self._client.set_terminated(opened.run_id, status)

    def _log_record(self, study: str, record: Record, reused: bool, adapter: Path | None) -> bool:
        from mlflow.entities import RunTag

        opened = self._get_study(study)
        child = opened.children.get(record.fingerprint)
        if child is not None and child.is_complete and is_up_to_date(child, record):
            return False
        metrics = missing = run_content.metrics(record)
        if child is not None:
            kept = None
            if is_up_to_date(child, record):
                kept = missing_metrics(read_logged(self._client, child), metrics)
            if kept is None:
                self._delete_run(opened, record.fingerprint)
                child = None
            else:
                missing = kept
        tags = run_content.tags(record, study, reused)
        start, end = run_content.time_range(record)
        if child is None:
            child = self._create_run(opened, record.configuration, tags, start)
        new_tags = [] if child.record_version else [RunTag(key, value) for key, value in tags.items()]
        child.record_version = tags["record"]
        params = run_content.params(record.configuration)
        log_in_batches(self._client, child.run_id, missing, params, new_tags)
        self._client.log_inputs(child.run_id, run_content.datasets(record))
        if adapter is not None and adapter.is_dir():
            log_model(self._client, opened.experiment_id, child.run_id, record, adapter)
        self._client.set_terminated(child.run_id, run_content.STATUS[record.state], end)
        child.is_complete, child.latest_metrics, child.logged = True, run_content.latest_metrics(record), None
        opened.stale_means = True
        return True

    def _create_run(
        self, opened: _StudyRun, configuration: Configuration, tags: Mapping[str, str], start: int
    ) -> ChildRun:
        """Create the run of a configuration. `start` is in milliseconds since the epoch."""
        name = run_content.run_name(configuration)
        run = self._client.create_run(opened.experiment_id, start, dict(tags), name)
        child = ChildRun(run.info.run_id, tags.get("record", ""), logged={})
        opened.children[configuration.fingerprint] = child
        child.params = {param.key: param.value for param in run_content.params(configuration)}
        return child

    def _get_study(self, name: str) -> _StudyRun:
        """Return the study, which is read again after an error."""
        if name not in self._study_descriptions:
            raise ValueError(f"call ensure_study({name!r}) first")
        if name not in self._studies:
            self._studies[name] = self._open_study(name)
        return self._studies[name]

    def _open_study(self, name: str) -> _StudyRun:
        """Find or create the study's experiment and run, and read which runs of configurations exist."""
        from mlflow.entities import RunTag

        question, tags = self._study_descriptions[name]
        tags = {"study": name, "role": "study", **tags}
        opened = _StudyRun(self._ensure_experiment(name, question), "", {})
        for run in self._search_runs(opened.experiment_id):
            run_tags = run.data.tags
            if run_tags.get("role") == "study":
                opened.run_id = opened.run_id or run.info.run_id
            elif run_tags.get("study") == name and (fingerprint := run_tags.get("fingerprint")):
                child = ChildRun(
                    run.info.run_id,
                    run_tags.get("record", ""),
                    run.info.status in ("FINISHED", "FAILED"),
                    run.data.metrics,
                    run.data.params,
                )
                if fingerprint in opened.children:  # two drivers wrote at once; the older run stays
                    self._delete_run(opened, fingerprint, child)
                    continue
                opened.children[fingerprint] = child
        if opened.run_id:
            self._client.log_batch(opened.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            self._client.update_run(opened.run_id, "RUNNING")
        else:
            tags[run_content.NOTE_TAG] = question
            run = self._client.create_run(opened.experiment_id, tags=tags, run_name=name)
            opened.run_id = run.info.run_id
        self._update_means(opened)
        return opened

    def update_means(self, study: str) -> None:
        """Write the saved views and the mean validation score of each group, if a run was written since."""
        with self._convert_errors():
            opened = self._get_study(study)
            if opened.stale_means:
                self._update_means(opened)

    def _update_means(self, opened: _StudyRun) -> None:
        from mlflow.entities import Metric

        params = {fingerprint: child.params for fingerprint, child in opened.children.items()}
        keys = saved_view.group_keys(params.values())
        groups = saved_view.group_runs(params, keys)
        for fingerprints in groups.values():
            runs = [child for f in fingerprints if (child := opened.children[f]).is_complete]
            scores = [run.latest_metrics[_SCORE] for run in runs if _SCORE in run.latest_metrics]
            for run in runs if scores else ():
                mean = fsum(scores) / len(scores)
                if run.latest_metrics.get(saved_view.MEAN_METRIC) != mean:
                    now = round(time.time() * 1000)
                    self._client.log_batch(run.run_id, [Metric(saved_view.MEAN_METRIC, mean, now, 0)])
                    run.latest_metrics = {**run.latest_metrics, saved_view.MEAN_METRIC: mean}
        self._write_views(opened, keys, list(groups))
        opened.stale_means = False

    def _write_views(
        self, opened: _StudyRun, keys: Sequence[str], groups: Sequence[tuple[str, ...]]
    ) -> None:
        created = self._client.get_experiment(opened.experiment_id).creation_time or 0
        for key, value in saved_view.tags(created, keys, groups).items():
            self._client.set_experiment_tag(opened.experiment_id, key, value)

    def _ensure_experiment(self, name: str, question: str) -> str:
        """Return the id of the study's experiment, which is created if it is missing."""
        from mlflow import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = (self._artifact_root / name).resolve().as_uri() if self._artifact_root else None
            try:
                tags = {**_EXPERIMENT_TAGS, run_content.NOTE_TAG: question}
                return self._client.create_experiment(name, location, tags)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._ensure_experiment(name, question)  # another driver has just created it
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

    def _delete_run(self, opened: _StudyRun, fingerprint: str, run: ChildRun | None = None) -> None:
        """Delete the run of a configuration, or another `run` of it, in a database permanently, with its files.

        MLflow's client only marks runs and models as deleted. `_hard_delete_run`, which `mlflow gc` uses, removes
        them. A server does not offer that: the marked run stays there until `mlflow gc` is run.
        """
        run_id = (run or opened.children.pop(fingerprint)).run_id
        store = self._client._tracking_client.store
        removed = [run_id]
        for model in find_models(self._client, opened.experiment_id, run_id) or ():
            self._client.delete_logged_model(model.model_id)
            if hasattr(store, "_hard_delete_logged_model"):
                store._hard_delete_logged_model(model.model_id)
                removed.append(f"models/{model.model_id}")
        self._client.delete_run(run_id)
        if hasattr(store, "_hard_delete_run"):
            store._hard_delete_run(run_id)
            if self._artifact_root is not None:
                for folder in (f for name in removed for f in self._artifact_root.glob(f"*/{name}")):
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
