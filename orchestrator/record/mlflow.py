"""MLflow runs, derived from the records: one for each configuration of a study, and one for the study.

A study is an experiment of the same name. The run of the study has the report, the verdicts and the command.
No run has a parent, because MLflow's pages collapse nested runs and leave them out of charts. `sync` creates
all runs again from the records.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import StudyEnd, Tracker, describe_error
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import REDACTED, redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path, with_full_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

ARTIFACTS_FOLDER = "mlflow-artifacts"
"""Folder of the artifacts beside a SQLite file."""
RUN_ROLE = "configuration"
"""Value of the tag `role` of the runs that the ranked table shows: all except the study's own run."""
MEAN_METRIC = "mean_validation_score"
"""Mean of the validation scores over the seeds of a point. Each run of the point has it. It sorts the ranked
table."""

_SCORE = "validation_score"
_STATUS = {"finished": "FINISHED", "diverged": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
_NOTE_TAG = "mlflow.note.content"
_MAX_TAG_LENGTH = 5000  # characters; MySQL's limit, and that of an experiment's tag in MLflow 2
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100  # the limits of `MlflowClient.log_batch`
# Codes of errors that a repeated request would cause again.
_PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")

_ENVIRONMENT = {
    # By default MLflow repeats a failed request for minutes. If only the answer was lost, a repeated
    # `create_run` creates a second run. `MlflowTracker.start` is called again instead and reads the runs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass
class _LaneRun:
    """What this process knows of the MLflow run of one configuration."""

    run_id: str
    point: str
    """Equal for runs that differ in the seed only."""
    start: int
    """Unix milliseconds."""
    record: str = ""
    """`run_values.record_version` of the record in the run; empty while its lane trains."""
    is_complete: bool = False
    score: float | None = None
    mean: float | None = None
    logged: dict[tuple[str, int], Metric] | None = None
    """Name and step -> metric, for a run that is not complete; None if another process has logged them."""


class MlflowTracker(Tracker):
    """The tracker of a study in MLflow.

    Args:
        tracking_uri: The tracking URI. Artifacts are stored by the server, or in a folder beside a SQLite
            file.
    """

    retries_at_end = True

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._database = sqlite_path(tracking_uri)
        self._study = StudyFile("", "", "")
        self._experiment = ""
        self._study_run = ""
        self._runs: dict[str, _LaneRun] = {}
        """Fingerprint -> run of the configuration."""

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self.tracking_uri)

    @property
    def view(self) -> str:
        """The address of the ranked table on MLflow's page, without a password.

        For a SQLite file, it is the address on an `mlflow ui` of this machine.
        """
        server = "http://127.0.0.1:5000"
        if self.tracking_uri.startswith(("http://", "https://")):
            parts = urlsplit(self.tracking_uri)
            server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        return f"{server}/{_view_path(self._experiment)}" if self._experiment else ""

    def is_outage(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        from mlflow import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if isinstance(error, MlflowException):
            return error.error_code not in _PERMANENT_ERRORS
        return isinstance(error, OSError | SQLAlchemyError)  # errors of `requests` are OSErrors

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Find or create the study's experiment and run, and read the runs of its configurations."""
        from mlflow.entities import RunTag

        self._study, self._runs, self._study_run = study, {}, ""
        self._experiment = self._ensure_experiment(study)
        oldest_first, most = ["attributes.start_time ASC"], 50_000  # the most that MLflow returns
        for run in self._client.search_runs([self._experiment], order_by=oldest_first, max_results=most):
            found = run.data.tags
            if found.get("role") == "study":
                self._study_run = self._study_run or run.info.run_id
            elif found.get("study") == study.name and (fingerprint := found.get("fingerprint")):
                if fingerprint in self._runs:  # two drivers wrote at once; the older run stays
                    self._client.delete_run(run.info.run_id)
                    continue
                self._runs[fingerprint] = _LaneRun(
                    run.info.run_id,
                    found.get("point", ""),
                    run.info.start_time,
                    found.get("record", ""),
                    run.info.status in ("FINISHED", "FAILED"),
                    run.data.metrics.get(_SCORE),
                    run.data.metrics.get(MEAN_METRIC),
                )
        tags = {"study": study.name, "role": "study", "command": study.command, **tags}
        if self._study_run:
            self._client.log_batch(self._study_run, tags=[RunTag(key, value) for key, value in tags.items()])
            self._client.update_run(self._study_run, "RUNNING")
        else:
            tags[_NOTE_TAG] = study.question
            made = self._client.create_run(self._experiment, tags=tags, run_name=study.name)
            self._study_run = made.info.run_id

    def log_progress(self, progress: LaneProgress) -> None:
        """Log the start or an evaluation of a lane in training. A run that has a record is not changed."""
        configuration, now = progress.configuration, round(time.time() * 1000)
        run = self._runs.get(configuration.fingerprint)
        if run is not None and run.record:
            return
        if run is None:
            run = self._create_run(configuration, _configuration_tags(configuration, self._study.name), now)
            self._log(run, [], _params(configuration), [])
        elif not progress.step:
            self._client.update_run(run.run_id, "RUNNING")  # an earlier driver has left it KILLED
        times = [(metric.step, metric.timestamp) for metric in self._logged(run).values()]
        if progress.step > (last := max(times, default=(0, run.start)))[0]:
            values = run_values.progress_values(progress, now, last)
            new = [value for value in values if value.step > last[0]]
            self._log(run, _to_metrics(new, f"validation_{configuration.task.metric}"), [], [])

    def log_record(self, record: Record) -> None:
        """Write the run of a record, unless the run is complete and has this record.

        A run of a lane in training, or one that a killed driver left incomplete, is completed. A run with an
        older record (stopped, now finished) or other values than the record's is replaced. The times of
        missing metrics are interpolated between those of the logged ones.
        """
        from mlflow.entities import RunTag

        run, version = self._runs.get(record.fingerprint), run_values.record_version(record)
        if run is not None and run.is_complete and run.record == version:
            return
        if run is not None and (run.is_complete or run.record not in ("", version)):
            self._client.delete_run(run.run_id)
            run = None
        start, end = run_values.time_range(record)
        logged = self._logged(run) if run is not None else {}
        times = {0: run.start if run is not None else start}
        times |= {metric.step: metric.timestamp for metric in logged.values()}
        metrics = _to_metrics(run_values.record_values(record, record.curve, times), _SCORE)
        final = {(metric.key, metric.step): metric.value for metric in metrics}
        is_same = all(_is_same(metric.value, final.get(key, math.inf)) for key, metric in logged.items())
        if run is not None and not is_same:  # the lane was trained again on another kind of device
            self._client.delete_run(run.run_id)
            run, logged = None, {}
        tags = _record_tags(record, self._study.name)
        run = run or self._create_run(record.configuration, tags, start)
        missing = [metric for metric in metrics if (metric.key, metric.step) not in logged]
        new_tags = [RunTag(key, value) for key, value in tags.items()]
        self._log(run, missing, _params(record.configuration), new_tags)
        self._client.set_terminated(run.run_id, _STATUS[record.state], max(end, *times.values()))
        run.record, run.is_complete, run.logged = version, True, None
        run.score, run.mean = final.get((_SCORE, record.steps)), None

    def flush(self) -> None:
        """Write to each run the mean validation score over the seeds of its point."""
        points: dict[str, list[_LaneRun]] = defaultdict(list)
        for run in self._runs.values():
            if run.is_complete:
                points[run.point].append(run)
        for runs in points.values():
            scores = [run.score for run in runs if run.score is not None and math.isfinite(run.score)]
            for run in runs if scores else ():
                mean = fsum(scores) / len(scores)
                if run.mean != mean:
                    self._client.log_metric(run.run_id, MEAN_METRIC, mean)
                    run.mean = mean

    def finish(self, end: StudyEnd) -> None:
        """Log the study's description and report, and end its run and the runs of lanes that did not finish.

        The description begins with a link to the ranked table, because MLflow's page shows its first line.
        """
        from mlflow.entities import Metric, RunTag

        self.flush()
        now = round(time.time() * 1000)
        if end.description:
            link = f"[Ranked table]({_view_path(self._experiment)})"
            note = _limit_note(f"{link} | {end.description}\n\n*{self._study.question}*")
            self._client.set_experiment_tag(self._experiment, _NOTE_TAG, note)
            metrics = [Metric(_mlflow_key(key), value, now, 0) for key, value in end.metrics.items()]
            self._client.log_batch(self._study_run, metrics, tags=[RunTag(_NOTE_TAG, note)])
        for path in end.report_files:
            self._client.log_artifact(self._study_run, str(path))
        for run in self._runs.values():
            if not run.is_complete:
                self._client.set_terminated(run.run_id, "KILLED")
        self._client.set_terminated(self._study_run, end.status)

    def _logged(self, run: _LaneRun) -> dict[tuple[str, int], Metric]:
        """Return the metrics that a run has: name and step -> metric."""
        if run.logged is None and not run.is_complete:
            names = [name for name in self._client.get_run(run.run_id).data.metrics if name != MEAN_METRIC]
            histories = [self._client.get_metric_history(run.run_id, name) for name in names]
            run.logged = {(each.key, each.step): each for history in histories for each in history}
        return {} if run.logged is None else run.logged

    def _create_run(self, configuration: Configuration, tags: Mapping[str, str], start: int) -> _LaneRun:
        """Create the run of a configuration with its tags. `start` is in Unix milliseconds."""
        name = run_values.run_name(configuration)
        made = self._client.create_run(self._experiment, start, dict(tags), name)
        run = _LaneRun(made.info.run_id, tags["point"], start, tags.get("record", ""), logged={})
        self._runs[configuration.fingerprint] = run
        return run

    def _log(self, run: _LaneRun, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        """Log metrics, parameters and tags, in several calls if MLflow's limits require it."""
        logged = self._logged(run)
        while metrics or params or tags:
            batch = metrics[:_METRICS_PER_CALL]
            self._client.log_batch(run.run_id, batch, params[:_PARAMS_PER_CALL], tags)
            logged.update({(metric.key, metric.step): metric for metric in batch})
            metrics, params, tags = metrics[_METRICS_PER_CALL:], params[_PARAMS_PER_CALL:], []

    def _ensure_experiment(self, study: StudyFile) -> str:
        """Return the id of the study's experiment. It is created if missing, and restored if deleted."""
        found = self._client.get_experiment_by_name(study.name)
        if found is None:
            folder = self._database.parent / ARTIFACTS_FOLDER / study.name if self._database else None
            # The kind makes MLflow's page open with the runs, in place of an empty list of traces.
            tags = {"mlflow.experimentKind": "custom_model_development", _NOTE_TAG: study.question}
            tags[_VIEW_TAG] = _VIEW
            location = folder.resolve().as_uri() if folder else None
            return self._client.create_experiment(study.name, location, tags)
        if found.lifecycle_stage == "deleted":  # its name cannot be used again until it is purged
            self._client.restore_experiment(found.experiment_id)
        if found.tags.get(_VIEW_TAG) != _VIEW:
            self._client.set_experiment_tag(found.experiment_id, _VIEW_TAG, _VIEW)
        return str(found.experiment_id)


# -- content of the runs, derived from the record alone, so that logging a record again writes the same values


def _configuration_tags(configuration: Configuration, study: str) -> dict[str, str]:
    """Return the tags of a run that are known before its training ends."""
    columns, names = configuration.to_columns(), ("variant", "task", "model", "model_content", "seed")
    return {
        "role": RUN_ROLE,
        "study": study,
        "fingerprint": configuration.fingerprint,
        "point": replace(configuration, seed=0).fingerprint,
        "state": "training",
        **{name: str(columns.get(name, "")) for name in names},
    }


def _record_tags(record: Record, study: str) -> dict[str, str]:
    """Return the tags of the run of a record."""
    found = _configuration_tags(record.configuration, study)
    found |= {"record": run_values.record_version(record), "state": record.state}
    found["commit"] = record.provenance.commit
    if record.reason or record.traceback:
        code = f"\n\n```\n{record.traceback[-(_MAX_TAG_LENGTH - 1000) :]}\n```" if record.traceback else ""
        found[_NOTE_TAG] = record.reason[:900] + code
    return found


def _params(configuration: Configuration) -> list[Param]:
    from mlflow.entities import Param

    return [Param(_mlflow_key(k), str(v)) for k, v in configuration.to_columns().items() if v is not None]


def _to_metrics(values: Iterable[run_values.Value], score: str) -> list[Metric]:
    """Return values as metrics. Those of `score` come first: MLflow compares runs by this metric."""
    from mlflow.entities import Metric

    ordered = sorted(values, key=lambda value: value.key != score)
    return [Metric(_mlflow_key(each.key), each.value, each.timestamp, each.step) for each in ordered]


def _mlflow_key(name: str) -> str:
    """Return a name that MLflow accepts: other characters, as in "hits@10", become underscores."""
    return re.sub(r"[^\w.\- ]", "_", name)[:250]


def _is_same(value: float, other: float) -> bool:
    return value == other or (math.isnan(value) and math.isnan(other))


def _limit_note(text: str) -> str:
    """Return a description, cut at the end of a line if it is too long for MLflow."""
    if len(text) <= _MAX_TAG_LENGTH:
        return text
    return text[: _MAX_TAG_LENGTH - 30].rpartition("\n")[0] + "\n\n(more in report.html)"


# -- the ranked table: the state of MLflow's page, as JSON in a tag of the experiment. A link could set order
# and filter, but not the columns. By default the page shows no score.

_COLUMNS = [f"metrics.`{each}`" for each in (MEAN_METRIC, _SCORE, "test_score", "train_loss", "seconds")]
_VIEW_TAG = "mlflow.sharedViewState.ranking"
_VIEW = json.dumps(
    {
        "searchFilter": f"tags.role = '{RUN_ROLE}'",
        "orderByKey": _COLUMNS[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": _COLUMNS,
        "columnOrder": ["attributes.`Run Name`", *_COLUMNS],
        "columnWidths": {"attributes.`Run Name`": 400, **dict.fromkeys(_COLUMNS, 150)},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "hideEmptyCharts": True,
    }
)


def _view_path(experiment: str) -> str:
    """Return the address of the ranked table, relative to that of the server."""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=ranking"


# -- the tracking URI


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
        OSError: The disk of its file is full or cannot be used.
    """
    shown = f"{option} {redact_secrets(uri)!r}"
    if REDACTED in uri:
        raise UsageError(f"{shown}: passwords are not stored; give the option with the password")
    if "://" not in uri or uri.startswith("file:") or uri == "sqlite://":
        raise UsageError(f"{shown}: must be sqlite:///FILE, or a server's address such as http://host:5000")
    path = sqlite_path(uri)
    if path is not None and not os.path.exists(path):
        with atomic_files.remove_created_folders(path.parent):  # `connect` makes it, if the study starts
            atomic_files.make_folder(shown, path.parent)
        return
    try:
        if path is None:
            connect(uri).search_experiments(max_results=1)
        else:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                database.execute("select count(*) from sqlite_master").fetchone()
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
