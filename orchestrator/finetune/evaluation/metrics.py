"""Metrics of a task with a head, computed from the predictions and targets of a whole split.

A metric is a finite number for any predictions. Where its definition divides by zero, for instance because
all predictions are equal, it is 0. scikit-learn and SciPy are imported on first use, since that takes a
second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np

from orchestrator.finetune.tasks.base import INVERSE_PERPLEXITY, Task
from orchestrator.util.errors import UsageError, suggest_nearest

Metric = Callable[[np.ndarray, np.ndarray], float]
"""A function of predictions and targets, each of shape (items,)."""


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of correct classes."""
    return float((predictions == targets).mean())


def f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return the F1 score of class 1 of two, as GLUE defines it for MRPC and QQP."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets == 1, predictions == 1, zero_division=0))


def macro_f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean F1 score over the classes that are predicted or true."""
    from sklearn.metrics import f1_score

    targets, predictions = _number_classes(targets, predictions)
    return float(f1_score(targets, predictions, average="macro", zero_division=0))


def matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return Matthews' correlation coefficient for any number of classes (Gorodkin 2004), from -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    targets, predictions = _number_classes(targets, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all items have one class, in predictions and targets
        return float(matthews_corrcoef(targets, predictions))


def _number_classes(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the classes as integers, (2, items): scikit-learn refuses floats with a fraction."""
    return np.unique(np.stack([targets, predictions]), return_inverse=True)[1].reshape(2, -1)


def pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return Pearson's correlation, from -1 to 1; 0 where a series is constant or a prediction not finite."""
    from scipy.stats import pearsonr

    if not np.isfinite(predictions).all() or _is_constant(predictions) or _is_constant(targets):
        return 0.0
    # Scaled, because the mean of very large predictions (near 1e308, of a diverging lane) would overflow.
    return float(pearsonr(predictions / np.abs(predictions).max(), targets).statistic)


def _is_constant(series: np.ndarray) -> bool:
    """Return whether the values differ by no more than rounding."""
    return bool(np.ptp(series / (np.abs(series).max() or 1.0)) <= 1e-12)


CLASSIFICATION_METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
}
REGRESSION_METRICS: Mapping[str, Metric] = {"pearson": pearson}


def check_metric(task: Task) -> None:
    """Check that the metric of a task with a head exists and suits the task's output.

    Raises:
        UsageError: It does not.
    """
    if task.metric != INVERSE_PERPLEXITY or task.output != "classification":
        get_metric(task)


def get_metric(task: Task) -> Metric:
    """Return the metric of a task with a head.

    Raises:
        UsageError: The metric does not exist, or does not suit the task's output.
    """
    known = CLASSIFICATION_METRICS if task.output == "classification" else REGRESSION_METRICS
    if task.metric not in known:
        raise UsageError(
            f"Task {task.name!r}: no {task.output} metric is called {task.metric!r}. "
            f"{suggest_nearest(task.metric, known)}"
        )
    if task.metric == "f1" and task.num_labels != 2:
        raise UsageError(
            f"Task {task.name!r}: f1 needs two classes, but the task has {task.num_labels}; use macro_f1."
        )
    return known[task.metric]
