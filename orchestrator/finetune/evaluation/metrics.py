"""Metrics of a whole split by name: what a head said against what it should have said.

Whatever the predictions are, a metric is a finite number: where the definition divides by zero (all
predictions alike, no pair of a class) it is 0, which is what a guess is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from orchestrator.finetune.tasks.base import Task
from orchestrator.util.errors import UsageError, suggest_nearest

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(said, truth), each (items,), to a number."""


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    """The share of classes that are right."""
    return float((predictions == targets).mean())


def f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1 of two (GLUE's convention)."""
    return _binary_f1(predictions == 1, targets == 1)


def macro_f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """The mean of every class's F1, over the classes that were said or true (as scikit-learn's)."""
    return float(
        np.mean([_binary_f1(predictions == c, targets == c) for c in np.union1d(predictions, targets)])
    )


def _binary_f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    total = predictions.sum() + targets.sum()
    return float(2 * (predictions & targets).sum() / total) if total else 0.0


def matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Matthews' correlation, for any number of classes (Gorodkin 2004): the covariance of the two one-hot
    codings by their deviations, -1 to 1."""
    classes = np.union1d(predictions, targets)
    a, b = predictions[:, None] == classes, targets[:, None] == classes
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return _correlation((a * b).sum(), (a * a).sum(), (b * b).sum())


def pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    """The correlation of two series of numbers, -1 to 1; 0 when one does not vary or is not finite."""
    if not np.isfinite(predictions).all():
        return 0.0
    # To one size first: a lane on its way out says 1e200, and the square of that is infinite.
    a, b = _scale_and_center(predictions), _scale_and_center(targets)
    return _correlation((a * b).sum(), (a * a).sum(), (b * b).sum())


def _scale_and_center(series: np.ndarray) -> np.ndarray:
    size = np.abs(series).max()
    centred = series / size - (series / size).mean() if size else series
    # What a constant leaves is rounding, not variation.
    return np.where(np.abs(centred).max() > 1e-12, centred, 0.0)


def _correlation(covariance: float, a: float, b: float) -> float:
    return float(np.clip(covariance / np.sqrt(a * b), -1.0, 1.0)) if a > 0 and b > 0 else 0.0


CLASSIFICATION_METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
}
REGRESSION_METRICS: Mapping[str, Metric] = {"pearson": pearson}


def get_metric(task: Task) -> Metric:
    """The metric of a task with a head. Raises BadInput for one that does not fit its answers."""
    known = CLASSIFICATION_METRICS if task.output == "classification" else REGRESSION_METRICS
    if task.metric not in known:
        raise UsageError(
            f"Task {task.name!r}: metric {task.metric!r} is none for {task.output}s. "
            f"{suggest_nearest(task.metric, known)}"
        )
    if task.metric == "f1" and task.num_labels != 2:
        raise UsageError(
            f"Task {task.name!r}: f1 is for two classes, it has {task.num_labels}; take macro_f1."
        )
    return known[task.metric]
