"""The metrics of a lane that MLflow and the other trackers show: names, steps, values and times.

`record_values` derives them from a record alone, the times included, so that they can be written again.
`progress_values` gives those of a lane in training, under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from orchestrator.record.schema import COLUMNS, Cost, LaneProgress, Record, StepMetrics, column_values
from orchestrator.study.configuration import Configuration

MAX_LIVE_STEPS = 50
"""The largest number of steps, besides those with an evaluation, that are shown while a lane trains."""


class Value(NamedTuple):
    """The value of a metric at one step."""

    key: str
    """Name of the metric."""
    step: int
    value: float
    timestamp: int
    """Milliseconds since the epoch."""


def run_name(configuration: Configuration) -> str:
    """Return the name of a lane's run: variant, learning rate and seed."""
    return (
        f"{configuration.variant.name} lr {configuration.optimizer.learning_rate:g} seed {configuration.seed}"
    )


def record_version(record: Record) -> str:
    """Return a text that differs between the records that a configuration has had one after another."""
    return f"{record.state} attempt {record.provenance.attempt} ended {record.provenance.ended:.3f}"


def select_live_steps(
    curve: Sequence[StepMetrics], total_steps: int, evaluation_steps: Collection[int]
) -> list[StepMetrics]:
    """Return the steps of a training curve that are shown while the lane trains.

    The choice depends on the configuration alone, so a lane that is trained again shows the same steps.

    Args:
        curve: The training curve so far.
        total_steps: Optimizer steps of the whole training.
        evaluation_steps: Steps at which the lane was evaluated.

    Returns:
        At most `MAX_LIVE_STEPS` evenly spaced steps, and those with an evaluation.
    """
    stride = math.ceil(total_steps / MAX_LIVE_STEPS)
    return [each for each in curve if each.step % stride == 0 or each.step in evaluation_steps]


def time_range(record: Record) -> tuple[int, int]:
    """Return start and end in milliseconds since the epoch; at least 1, since MLflow reads 0 as "now"."""
    start = max(1, round(record.provenance.started * 1000))
    return start, max(start, round(record.provenance.ended * 1000))


def record_values(
    record: Record, curve: Sequence[StepMetrics], times: Mapping[int, int] | None = None
) -> list[Value]:
    """Return the training curve, the evaluations, and the final scores and cost of a record.

    Args:
        record: The record.
        curve: The steps of the record's curve that are wanted.
        times: Step -> milliseconds since the epoch, for steps whose time is known because the lane was shown
            while it was in training. The times of other steps are interpolated linearly.

    Returns:
        The values. A later step never has an earlier time.
    """
    start, end = time_range(record)
    known = {0: start, max(1, record.steps): end, **(times or {})}
    return _add_times(list(untimed_values(record, curve)), known)


def progress_values(progress: LaneProgress, timestamp: int, earlier: tuple[int, int]) -> list[Value]:
    """Return the values that a lane in training has added since its last progress.

    Args:
        progress: The start or the evaluation.
        timestamp: Its time in milliseconds since the epoch.
        earlier: Step and time of the lane's last progress. The times of steps since then are interpolated.
    """
    if not progress.step:
        rate = rate_values(progress.configuration)
        return [Value(key, 0, value, timestamp) for key, value in rate.items()]
    untimed = [(key, each.step, value) for each in progress.curve for key, value in _step_values(each)]
    untimed += [(f"validation_{key}", progress.step, value) for key, value in progress.scores.items()]
    return _add_times(untimed, {earlier[0]: min(earlier[1], timestamp), progress.step: timestamp})


def _add_times(values: Sequence[tuple[str, int, float]], times: Mapping[int, int]) -> list[Value]:
    """Add times to (name, step, value), interpolated linearly between those of `times`: step -> time.

    A value that is not finite becomes NaN, which a chart shows as a gap. MLflow's database would store
    infinity as 1.8e308, and one such point would flatten all curves of a chart.
    """
    import numpy as np

    known = dict(sorted(times.items()))
    # The clocks of the driver and of the trainer may differ.
    ascending = np.maximum.accumulate(list(known.values()))
    timestamps = np.interp([step for _, step, _ in values], list(known), ascending)
    return [
        Value(key, step, value if math.isfinite(value) else math.nan, round(timestamp))
        for (key, step, value), timestamp in zip(values, timestamps.tolist(), strict=True)
    ]


def rate_values(configuration: Configuration) -> Mapping[str, float]:
    """Return the metric `log10_learning_rate`, because MLflow's scatter charts have no logarithmic axis."""
    rate = configuration.optimizer.learning_rate
    return {"log10_learning_rate": math.log10(rate)} if rate > 0 else {}


def _step_values(step: StepMetrics) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the metrics of one training step."""
    for name, value in column_values(step).items():
        if name != "step":
            yield "scheduled_learning_rate" if name == "learning_rate" else name, value


def untimed_values(record: Record, curve: Sequence[StepMetrics]) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step, value) of all metrics of a record.

    Args:
        record: The record.
        curve: The steps of the record's curve that are wanted.
    """
    for key, value in rate_values(record.configuration).items():
        yield key, 0, value
    for step in curve:
        for key, value in _step_values(step):
            yield key, step.step, value
    for evaluation in record.evaluations:
        for key, value in evaluation.scores.items():
            yield f"{evaluation.split}_{key}", evaluation.step, value
    sizes = [name for name, each in COLUMNS[Cost].items() if each.unit == "bytes"]
    for name, value in (record.results() | column_values(record.cost)).items():
        if value is not None and (value or name not in sizes):
            yield name, record.steps, value


def latest_values(record: Record) -> dict[str, float]:
    """Return metric -> its last value, for the values that are finite."""
    last = {key: value for key, _, value in untimed_values(record, record.curve[-1:])}
    return {key: value for key, value in last.items() if math.isfinite(value)}
