"""Content of the MLflow run of one configuration: tags, parameters, metrics and datasets.

Everything is derived from the record alone, so that logging it twice writes the same rows. The values of the
metrics are those of `run_values`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.mlflow.saved_view import RUN_ROLE
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.study.configuration import Configuration
from variants import catalogue

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

STATUS = {"finished": "FINISHED", "diverged": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
NOTE_TAG = "mlflow.note.content"
_MAX_TAG_LENGTH = 5000  # characters; MySQL's limit, and that of an experiment's tag in MLflow 2
_MAX_DIGEST_LENGTH = 36  # characters; MLflow's limit


def configuration_tags(configuration: Configuration, study: str) -> dict[str, str]:
    """Return the tags of a run that are known before its training ends.

    Args:
        configuration: The configuration.
        study: Name of the study.
    """
    return {
        "role": RUN_ROLE,
        "study": study,
        "fingerprint": configuration.fingerprint,
        "state": "training",
        "variant": configuration.variant.name,
        "axis": _axis(configuration.variant.name),
        "task": configuration.task.name,
        "model": configuration.model.name,
        "model_content": configuration.model.content,
        "seed": str(configuration.seed),
        "mlflow.runColor": _color(configuration.variant.name),
    }


def tags(record: Record, study: str, reused: bool) -> dict[str, str]:
    """Return the tags of the run of a record.

    Args:
        record: The record.
        study: Name of the study.
        reused: Whether the store had the record before the study requested it. If so, the tag `reused_from`
            gives the record's time and commit.
    """
    provenance = record.provenance
    found = configuration_tags(record.configuration, study)
    found |= {"record": run_values.record_version(record), "state": record.state, "commit": provenance.commit}
    if reused:
        made = datetime.fromtimestamp(provenance.ended, UTC)
        found["reused_from"] = f"{made:%Y-%m-%d %H:%M:%S} UTC, commit {provenance.commit}"
    if record.reason or record.traceback:
        code = f"\n\n```\n{record.traceback[-(_MAX_TAG_LENGTH - 1000) :]}\n```" if record.traceback else ""
        found[NOTE_TAG] = record.reason[:900] + code
    return found


def limit_note(text: str) -> str:
    """Return a description, cut at the end of a line if it is too long for MLflow."""
    if len(text) <= _MAX_TAG_LENGTH:
        return text
    return text[: _MAX_TAG_LENGTH - 30].rpartition("\n")[0] + "\n\n(more in report.html)"


# Twenty distinct colors (after Sasha Trubetskoy), without those too pale on a white page.
# fmt: off
_COLORS = (
    "#E6194B", "#3CB44B", "#4363D8", "#F58231", "#911EB4",
    "#42B6D9", "#F032E6", "#9A6324", "#00B3A4", "#800000",
    "#808000", "#FF6B6B", "#A9A9A9", "#E6A800", "#DCBEFF",
    "#FF8FAB", "#5FBF9F", "#6A3D9A", "#B15928", "#1F9E89",
)
# fmt: on


def _color(variant: str) -> str:
    """Return one color for all runs of a variant in MLflow's charts, which by default color each run anew."""
    if variant == "lora":
        return "#000000"
    names = catalogue.names()
    number = names.index(variant) if variant in names else zlib.crc32(variant.encode())
    return _COLORS[number % len(_COLORS)]


def _axis(variant: str) -> str:
    try:
        return catalogue.axis(variant)
    except ValueError:  # a variant that was renamed since
        return "unknown"


def params(configuration: Configuration) -> list[Param]:
    """Return the hyperparameters as MLflow parameters."""
    from mlflow.entities import Param

    return [Param(mlflow_key(k), str(v)) for k, v in configuration.to_columns().items() if v is not None]


def mlflow_key(name: str) -> str:
    """Return a name that MLflow accepts: other characters, as in "hits@10", become underscores."""
    return re.sub(r"[^\w.\- ]", "_", name)[:250]


def metrics(record: Record, times: Mapping[int, int] | None = None) -> list[Metric]:
    """Return the training curve, the evaluations, and the final scores and cost as MLflow metrics.

    A value that is not finite is logged as NaN, which a chart draws as a gap. MLflow's database would turn
    infinity into 1.8e308, and one such point would flatten all curves of a chart.

    Args:
        record: The record.
        times: See `run_values.record_values`.

    Returns:
        The metrics, the score first. A later step never has an earlier time.
    """
    values = run_values.record_values(record, record.curve, times)
    return _score_first(values, "validation_score")


def progress_metrics(progress: LaneProgress, timestamp: int, earlier: tuple[int, int]) -> list[Metric]:
    """Return `run_values.progress_values` of an evaluation as MLflow metrics; none of the start.

    Args:
        progress: The start or the evaluation.
        timestamp: Its time in milliseconds since the epoch.
        earlier: Step and time (milliseconds since the epoch) of the lane's last progress.
    """
    values = run_values.progress_values(progress, timestamp, earlier) if progress.step else []
    return _score_first(values, f"validation_{progress.configuration.task.metric}")


def _score_first(values: Sequence[run_values.Value], score: str) -> list[Metric]:
    """Return values as metrics, first those of a score.

    MLflow shows the metric that was logged first when runs are compared.
    """
    return [_metric(value) for value in sorted(values, key=lambda value: value.key != score)]


def _metric(value: run_values.Value) -> Metric:
    from mlflow.entities import Metric

    shown = value.value if math.isfinite(value.value) else math.nan
    return Metric(mlflow_key(value.key), shown, value.timestamp, value.step)


def latest_metrics(record: Record) -> dict[str, float]:
    """Return the last value of each metric, as in MLflow's table of runs; only finite values."""
    return {mlflow_key(key): value for key, value in run_values.latest_values(record).items()}


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
