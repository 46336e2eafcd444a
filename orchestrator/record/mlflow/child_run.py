"""The MLflow run of one configuration: written while its lane trains, and completed from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.mlflow import run_content
from orchestrator.record.mlflow.saved_view import MEAN_METRIC
from orchestrator.record.schema import LaneProgress, Record
from variants.variant_names import short_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Param, RunTag

_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100  # the limits of `MlflowClient.log_batch`
MODEL_TYPE = "adapter in the store"
"""The type of the logged models of adapters."""


@dataclass
class ChildRun:
    """The state of the MLflow run of one configuration, as far as this process knows it."""

    run_id: str
    started: int = 0
    """The start of the run in milliseconds since the epoch."""
    record_version: str = ""
    """`run_values.record_version` of the record that the run shows; empty while its lane trains."""
    is_complete: bool = False
    """True if the run has ended with everything that its record holds."""
    latest_metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> last value of the metric."""
    params: Mapping[str, str] = field(default_factory=dict)
    """The hyperparameters: name -> value."""
    logged: dict[tuple[str, int], Metric] | None = None
    """All metrics of an incomplete run: (name, step) -> metric. None if another process has written them, so
    that they must be read from MLflow."""


def is_up_to_date(child: ChildRun, record: Record) -> bool:
    """Return whether a run need not be replaced by a new one for its record.

    A complete run must have been written from this record and have its last metrics. An incomplete run must
    not have been written from another record; the missing parts can be added.

    Args:
        child: The run.
        record: The current record of its configuration.
    """
    if child.is_complete:
        wanted = run_content.latest_metrics(record)
        return child.record_version == run_values.record_version(record) and all(
            child.latest_metrics.get(key) == value for key, value in wanted.items()
        )
    return child.record_version in ("", run_values.record_version(record))


def read_logged(client: MlflowClient, child: ChildRun) -> dict[tuple[str, int], Metric]:
    """Return `child.logged`, which is read from MLflow first if another process wrote the metrics.

    Args:
        client: The client.
        child: The run.

    Returns:
        (name, step) -> metric.
    """
    if child.logged is None:
        child.logged = {
            (metric.key, metric.step): metric
            for key in child.latest_metrics
            if key != MEAN_METRIC
            for metric in client.get_metric_history(child.run_id, key)
        }
    return child.logged


def missing_metrics(
    logged: Mapping[tuple[str, int], Metric], started: int, record: Record
) -> list[Metric] | None:
    """Return the metrics of a record that its run lacks.

    Args:
        logged: The run's metrics: (name, step) -> metric.
        started: The start of the run in milliseconds since the epoch.
        record: The record.

    Returns:
        The missing metrics, with times interpolated between those of the logged ones. None if the run has a
        value that differs from the record's, so that the run must be replaced. This happens when a lane was
        trained again on another kind of device.
    """
    times = {0: started, **{step: metric.timestamp for (_, step), metric in logged.items()}}
    metrics = {(metric.key, metric.step): metric for metric in run_content.metrics(record, times)}
    for key, metric in logged.items():
        if key not in metrics or not _is_same(metric.value, metrics[key].value):
            return None
    return [metric for key, metric in metrics.items() if key not in logged]


def _is_same(value: float, other: float) -> bool:
    return value == other or (math.isnan(value) and math.isnan(other))


def log_in_batches(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric],
    params: Sequence[Param],
    tags: Sequence[RunTag],
) -> None:
    """Log metrics, parameters and tags in calls of the size that MLflow accepts.

    Args:
        client: The client.
        run_id: The run.
        metrics: Metrics of any number.
        params: Parameters of any number.
        tags: At most 100 tags; they are logged with the first call.
    """
    while metrics or params or tags:
        client.log_batch(run_id, metrics[:_METRICS_PER_CALL], params[:_PARAMS_PER_CALL], tags)
        metrics, params, tags = metrics[_METRICS_PER_CALL:], params[_PARAMS_PER_CALL:], ()


def log_progress(client: MlflowClient, child: ChildRun, progress: LaneProgress, timestamp: int) -> None:
    """Log the start or an evaluation of a lane in training, except metrics that its run already has.

    Args:
        client: The client.
        child: The lane's run.
        progress: The start, which logs the hyperparameters, or the evaluation.
        timestamp: The time of the metrics in milliseconds since the epoch.
    """
    logged = read_logged(client, child)
    earlier = max(((step, each.timestamp) for (_, step), each in logged.items()), default=(0, child.started))
    new = [
        metric
        for metric in run_content.progress_metrics(progress, timestamp, earlier)
        if (metric.key, metric.step) not in logged
    ]
    params = [] if progress.step else run_content.params(progress.configuration)
    log_in_batches(client, child.run_id, new, params, ())
    if params:
        child.params = {param.key: param.value for param in params}
    logged |= {(metric.key, metric.step): metric for metric in new}


def update_models(
    client: MlflowClient,
    experiment_id: str,
    children: Mapping[str, ChildRun],
    models: Mapping[str, Mapping[str, str]],
) -> None:
    """Create, complete and delete logged models, so that a study has one for each adapter that it keeps.

    A logged model has tags and no files: the adapter is in the store, and a tag has the command that exports
    it. A model that an interrupted call has left incomplete is completed. A server older than MLflow 3 has no
    logged models and is left as it is.

    Args:
        client: The client.
        experiment_id: The study's experiment.
        children: Fingerprint -> run of the configuration.
        models: Fingerprint -> tags of the model, for each adapter; see `adapter_models`.
    """
    found = find_models(client, experiment_id)
    if found is None:
        return
    runs = {child.run_id: fingerprint for fingerprint, child in children.items() if fingerprint in models}
    by_run = {model.source_run_id: model for model in found if model.model_type == MODEL_TYPE}
    for run_id in by_run.keys() - runs.keys():
        client.delete_logged_model(by_run[run_id].model_id)
    for run_id, fingerprint in runs.items():
        model, tags = by_run.get(run_id), dict(models[fingerprint])
        if model is None:
            name = f"{short_name(tags['variant'])}-{fingerprint[:12]}"
            model = client.create_logged_model(experiment_id, name, run_id, tags, model_type=MODEL_TYPE)
        elif {key: model.tags.get(key) for key in tags} != tags:
            client.set_logged_model_tags(model.model_id, tags)
        if model.status != "READY":
            _link_model(client, run_id, model.model_id)
            client.finalize_logged_model(model.model_id, "READY")


def _link_model(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Link a model to its run, unless an interrupted call has done it: MLflow keeps repeated links."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    linked = {output.model_id for output in outputs.model_outputs} if outputs is not None else set()
    if model_id not in linked:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])


def find_models(client: MlflowClient, experiment_id: str, run_id: str = "") -> list[LoggedModel] | None:
    """Return the logged models of an experiment, or of one run of it.

    Args:
        client: The client.
        experiment_id: The experiment.
        run_id: The run; empty for all runs.

    Returns:
        The models; None if the server is older than MLflow 3, which has none.
    """
    from mlflow import MlflowException

    wanted = f"source_run_id = '{run_id}'" if run_id else None
    found: list[LoggedModel] = []
    token = None
    try:
        while True:
            page = client.search_logged_models([experiment_id], wanted, page_token=token)
            found += page
            token = page.token
            if not token:
                return found
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
            raise
        return None
