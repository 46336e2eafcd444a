"""Content of an MLflow child run: tags, parameters, metrics and datasets of one record.

Everything, also every time, follows from the record alone, so that logging it twice writes the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.record.schema import Record, StepMetrics

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

STATUS = {"finished": "FINISHED", "diverged": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
NOTE_TAG = "mlflow.note.content"
_MAX_TAG_LENGTH = 5000  # characters; MySQL's limit
_MAX_DIGEST_LENGTH = 36  # characters; MLflow's limit


def record_version(record: Record) -> str:
    """Return a text that tells a record from the earlier and later ones of its configuration."""
    return f"{record.state} attempt {record.provenance.attempt} ended {record.provenance.ended:.3f}"


def run_name(record: Record) -> str:
    """Return the name of the child run: variant, learning rate and seed."""
    configuration = record.configuration
    return (
        f"{configuration.variant.name} lr {configuration.optimizer.learning_rate:g} seed {configuration.seed}"
    )


def tags(record: Record, study: str, parent: str, reused: bool) -> dict[str, str]:
    """Return the tags of a child run.

    Args:
        record: The record.
        study: Name of the study.
        parent: Id of the study's parent run.
        reused: Whether the store had the record before the study requested it. The tag `reused_from` then
            has its time and commit.
    """
    configuration, provenance = record.configuration, record.provenance
    found = {
        "mlflow.parentRunId": parent,
        "study": study,
        "fingerprint": record.fingerprint,
        "record": record_version(record),
        "state": record.state,
        "variant": configuration.variant.name,
        "axis": _axis(configuration.variant.name),
        "task": configuration.task.name,
        "model": configuration.model.name,
        "seed": str(configuration.seed),
        "commit": provenance.commit,
    }
    if reused:
        made = datetime.fromtimestamp(provenance.ended, UTC)
        found["reused_from"] = f"{made:%Y-%m-%d %H:%M:%S} UTC, commit {provenance.commit}"
    if record.reason or record.traceback:
        code = f"\n\n```\n{record.traceback[-(_MAX_TAG_LENGTH - 1000) :]}\n```" if record.traceback else ""
        found[NOTE_TAG] = record.reason[:900] + code
    return found


def _axis(variant: str) -> str:
    from variants import catalogue

    try:
        return catalogue.axis(variant)
    except ValueError:  # a variant of another tool (peft:...), or one renamed since
        return "unknown"


def time_range(record: Record) -> tuple[int, int]:
    """Return start and end in milliseconds since the epoch, at least 1: MLflow takes 0 for "now"."""
    start = max(1, round(record.provenance.started * 1000))
    return start, max(start, round(record.provenance.ended * 1000))


def params(record: Record) -> list[Param]:
    """Return the hyperparameters as MLflow parameters."""
    from mlflow.entities import Param

    return [
        Param(_mlflow_key(k), str(v)) for k, v in record.configuration.to_columns().items() if v is not None
    ]


def _mlflow_key(name: str) -> str:
    """Return a name that MLflow accepts: a score of a task may be called "hits@10"."""
    return re.sub(r"[^\w.\- ]", "_", name)[:250]


def metrics(record: Record) -> list[Metric]:
    """Return the training curve, the evaluations, and the final scores and cost.

    A value that is not finite is logged as NaN, which a chart draws as a gap. MLflow's database would turn
    infinity into 1.8e308, and one such point flattens all curves of a chart.
    """
    from mlflow.entities import Metric

    start, end = time_range(record)

    def timestamp_at_step(step: int) -> int:  # steps take about the same time
        return start + round((end - start) * min(1.0, step / max(1, record.steps)))

    return [
        Metric(_mlflow_key(key), value if math.isfinite(value) else math.nan, timestamp_at_step(step), step)
        for key, step, value in _metric_values(record, record.curve)
    ]


def latest_metrics(record: Record) -> dict[str, float]:
    """Return the last value of each metric if it is finite, as in MLflow's table of runs."""
    last = {_mlflow_key(key): value for key, _, value in _metric_values(record, record.curve[-1:])}
    return {key: value for key, value in last.items() if math.isfinite(value)}


def _metric_values(record: Record, curve: Sequence[StepMetrics]) -> Iterator[tuple[str, int, float]]:
    for step in curve:
        yield "train_loss", step.step, step.loss
        yield "learning_rate", step.step, step.learning_rate
        yield "gradient_norm", step.step, step.gradient_norm
    for evaluation in record.evaluations:
        for key, value in evaluation.scores.items():
            yield f"{evaluation.split}_{key}", evaluation.step, value
    metric = record.configuration.task.metric
    for split, score in (("validation", record.score("validation")), ("test", record.score("test"))):
        if score is not None:
            yield f"{split}_score", record.steps, score
        if metric in (untrained := record.baseline_scores.get(split, {})):
            yield f"untrained_{split}_score", record.steps, untrained[metric]
    yield "seconds", record.steps, record.cost.train_seconds + record.cost.evaluate_seconds
    yield "tokens", record.steps, record.cost.tokens
    yield "trainable_parameters", record.steps, record.cost.trainable_parameters


def datasets(record: Record) -> list[DatasetInput]:
    """Return the task's splits as dataset inputs: name "task/split", with the data's revision as digest."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag

    task = record.configuration.task
    inputs = []
    for split, context in (("train", "training"), ("validation", "validation"), ("test", "test")):
        source = CodeDatasetSource({"task": task.name, "revision": task.revision, "split": split})
        name = f"{task.name}/{split}"
        data = MetaDataset(source, name, task.revision[:_MAX_DIGEST_LENGTH])  # type: ignore[abstract]  # MLflow's class is wrongly marked as abstract
        inputs.append(DatasetInput(Dataset(**data.to_dict()), [InputTag("mlflow.data.context", context)]))
    return inputs
