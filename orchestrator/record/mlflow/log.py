"""MLflow runs as a projection of the store: the driver alone writes them, and `sync` can rebuild them.

A study is an experiment of the same name. Each of its configurations is a run, and the study itself is one
more run, which has the report, the verdicts and the command. No run has a parent, because MLflow's pages show
nested runs closed, and their charts leave them out. There is one experiment per study because these pages
show an experiment; several experiments can still be selected together. The experiment has two
saved views (`saved_view`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.mlflow import run_content, saved_view
from orchestrator.record.mlflow.child_run import (
    ChildRun,
    is_up_to_date,
    log_in_batches,
    log_progress,
    missing_metrics,
    read_logged,
    update_models,
)
from orchestrator.record.mlflow.connection import Connection
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.study.configuration import Configuration

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_SCORE = "validation_score"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of a new experiment. MLflow's page opens with the runs, in place of an empty list of traces."""


@dataclass
class _StudyRun:
    """The state of a study in MLflow, as far as this process knows it."""

    experiment_id: str
    run_id: str
    """The run of the study itself."""
    children: dict[str, ChildRun]
    """Fingerprint -> run of the configuration."""
    created: int
    """Time of the experiment's creation in milliseconds since the epoch, which the saved views show."""
    stale_means: bool = False
    """True if a run was written after the last `MlflowLogger.update_means`."""
    views: Mapping[str, str] = field(default_factory=dict)
    """The saved views as last written: tag of the experiment -> value."""


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
        self._connection = Connection(tracking_uri)
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
        return saved_view.link(self.tracking_uri, opened.experiment_id) if opened else ""

    def log_records(
        self,
        study: str,
        records: Iterable[Record],
        reused: Set[str] = frozenset(),
    ) -> int:
        """Write the run of each record, if it is missing or differs. Call `ensure_study` first.

        There is one run for each study and fingerprint. A complete run is left as it is. A run that shows a
        lane in training, or that a killed driver left incomplete, is completed. A run is replaced if it shows
        an older record (stopped, now finished), or if its values differ from the record's (after damage to
        the database).

        Args:
            study: Name of the study.
            records: The records.
            reused: Fingerprints whose new run gets the tag `reused_from`.

        Returns:
            The number of runs that were written.
        """
        written = 0
        for record in records:
            with self._convert_errors():
                written += self._log_record(study, record, record.fingerprint in reused)
        return written

    def log_progress(self, study: str, progress: LaneProgress) -> None:
        """Show the start or an evaluation of a lane that is in training. Call `ensure_study` first.

        The lane's run is created if it is missing. A run that already shows a record is left as it is.

        Args:
            study: Name of the study.
            progress: The start or the evaluation.
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
        models: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Write the saved views and the description, and end the study's run and the unfinished ones.

        Args:
            study: Name of the study.
            status: FINISHED, FAILED or KILLED.
            report_files: Files to log as artifacts of the study's run.
            description: Verdicts and best points in Markdown; empty: the description stays as it is. MLflow's
                page shows the first line, which begins with links to the views, and the rest after a click.
            metrics: Name -> value of the metrics of the study's run, logged together with a description.
            models: Fingerprint -> tags of the logged model of each adapter that the study keeps; None: the
                models stay as they are.
        """
        from mlflow.entities import Metric, RunTag

        with self._convert_errors():
            opened, now = self._get_study(study), round(time.time() * 1000)
            self._update_means(opened)
            if description:
                question = self._study_descriptions[study][0]
                links = saved_view.markdown_links(opened.experiment_id)
                note = run_content.limit_note(f"{links} | {description}\n\n*{question}*")
                self._client.set_experiment_tag(opened.experiment_id, run_content.NOTE_TAG, note)
                tags = [RunTag(run_content.NOTE_TAG, note)]
                values = [Metric(run_content.mlflow_key(k), v, now, 0) for k, v in (metrics or {}).items()]
                log_in_batches(self._client, opened.run_id, values, (), tags)
            for path in report_files:
                self._client.log_artifact(opened.run_id, str(path))
            if models is not None:
                update_models(self._client, opened.experiment_id, opened.children, models)
            for child in opened.children.values():
                if not child.is_complete:
                    self._client.set_terminated(child.run_id, "KILLED")
            self._client.set_terminated(opened.run_id, status)

    def _log_record(self, study: str, record: Record, reused: bool) -> bool:
        from mlflow.entities import RunTag

        opened = self._get_study(study)
        child = opened.children.get(record.fingerprint)
        if child is not None and child.is_complete and is_up_to_date(child, record):
            return False
        missing = None
        if child is not None and is_up_to_date(child, record):
            missing = missing_metrics(read_logged(self._client, child), child.started, record)
        if child is not None and missing is None:
            self._connection.delete_run(opened.experiment_id, child.run_id)
            del opened.children[record.fingerprint]
            child = None
        tags = run_content.tags(record, study, reused)
        start, end = run_values.time_range(record)
        if child is None or missing is None:
            missing = run_content.metrics(record)
            child = self._create_run(opened, record.configuration, tags, start)
        new_tags = [] if child.record_version else [RunTag(key, value) for key, value in tags.items()]
        child.record_version = tags["record"]
        params = run_content.params(record.configuration)
        log_in_batches(self._client, child.run_id, missing, params, new_tags)
        child.params = {param.key: param.value for param in params}  # a killed driver may have logged none
        self._client.log_inputs(child.run_id, run_content.datasets(record))
        end = max([end, *(metric.timestamp for metric in (child.logged or {}).values())])
        self._client.set_terminated(child.run_id, run_content.STATUS[record.state], end)
        child.is_complete, child.latest_metrics, child.logged = True, run_content.latest_metrics(record), None
        opened.stale_means = True
        return True

    def _create_run(
        self, opened: _StudyRun, configuration: Configuration, tags: Mapping[str, str], start: int
    ) -> ChildRun:
        """Create the run of a configuration, starting at `start` (milliseconds since the epoch)."""
        name = run_values.run_name(configuration)
        run = self._client.create_run(opened.experiment_id, start, dict(tags), name)
        child = ChildRun(run.info.run_id, start, tags.get("record", ""), logged={})
        opened.children[configuration.fingerprint] = child
        return child

    def _get_study(self, name: str) -> _StudyRun:
        """Return the state of a study, read again from MLflow after an error."""
        if name not in self._study_descriptions:
            raise ValueError(f"call ensure_study({name!r}) first")
        if name not in self._studies:
            self._studies[name] = self._open_study(name)
        return self._studies[name]

    def _open_study(self, name: str) -> _StudyRun:
        """Find or create the study's experiment and run, and read the runs of its configurations."""
        from mlflow.entities import RunTag

        question, tags = self._study_descriptions[name]
        tags = {"study": name, "role": "study", **tags}
        experiment = self._ensure_experiment(name, question)
        opened = _StudyRun(experiment.experiment_id, "", {}, experiment.creation_time or 0)
        for run in self._search_runs(opened.experiment_id):
            run_tags = run.data.tags
            if run_tags.get("role") == "study":
                opened.run_id = opened.run_id or run.info.run_id
            elif run_tags.get("study") == name and (fingerprint := run_tags.get("fingerprint")):
                child = ChildRun(
                    run.info.run_id,
                    run.info.start_time or 0,
                    run_tags.get("record", ""),
                    run.info.status in ("FINISHED", "FAILED"),
                    run.data.metrics,
                    run.data.params,
                )
                if fingerprint in opened.children:  # two drivers wrote at once; the older run stays
                    self._connection.delete_run(opened.experiment_id, child.run_id)
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
        """Write the saved views, and to each run the mean validation score of its group.

        A group has the runs of one point, which differ in the seed. Nothing is written if no run of the study
        was written after the last call.

        Args:
            study: Name of the study.
        """
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
        views = saved_view.tags(opened.created, keys, list(groups))
        for key, value in views.items():
            if opened.views.get(key) != value:
                self._client.set_experiment_tag(opened.experiment_id, key, value)
        opened.views, opened.stale_means = views, False

    def _ensure_experiment(self, name: str, question: str) -> Experiment:
        """Return the study's experiment, created if it is missing and restored if it was deleted."""
        from mlflow import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            root = self._connection.artifact_root
            location = (root / name).resolve().as_uri() if root else None
            try:
                tags = {**_EXPERIMENT_TAGS, run_content.NOTE_TAG: question}
                return self._client.get_experiment(self._client.create_experiment(name, location, tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._ensure_experiment(name, question)  # another driver has just created it
        if found.lifecycle_stage == "deleted":  # its name cannot be used again until it is purged
            self._client.restore_experiment(found.experiment_id)
        return found

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

    @property
    def _client(self) -> MlflowClient:
        return self._connection.client

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A request whose answer was lost may have been executed, so the next call reads the runs again.
            self._studies.clear()
            self._connection.raise_converted(error)
