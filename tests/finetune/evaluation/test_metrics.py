"""Metrics against values computed by hand and against their definitions in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.tasks.letters import Letters
from orchestrator.finetune.tasks.reviews import Reviews
from orchestrator.util.errors import UsageError

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)
PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
NUMBERS = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3, allow_subnormal=False)), min_size=2, max_size=60
)


def columns(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    predictions, targets = zip(*pairs, strict=True)
    return np.array(predictions, dtype=float), np.array(targets, dtype=float)


def test_metrics_equal_values_computed_by_hand() -> None:
    predictions, targets = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert metrics.accuracy(predictions, targets) == 0.6
    assert metrics.f1(predictions, targets) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.macro_f1(predictions, targets) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2*1 - 1*1) / sqrt(3*3*2*2)
    assert metrics.matthews(predictions, targets) == pytest.approx(1 / 6)
    assert metrics.pearson(np.array([1.0, 2, 3, 5]), np.array([2.0, 4, 6, 10])) == pytest.approx(1)
    assert metrics.pearson(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert metrics.pearson(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)


def f1_of(label: float, predictions: np.ndarray, targets: np.ndarray) -> float:
    total = (predictions == label).sum() + (targets == label).sum()
    return 2 * ((predictions == label) & (targets == label)).sum() / total if total else 0.0


def gorodkin(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return the covariance of the one-hot codes divided by their standard deviations (Gorodkin 2004)."""
    classes = np.union1d(predictions, targets)
    a, b = predictions[:, None] == classes, targets[:, None] == classes
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    return (a * b).sum() / scale if scale else 0.0


@given(CLASSES)
def test_class_metrics_equal_their_definitions(pairs: list[tuple[int, int]]) -> None:
    predictions, targets = columns(pairs)
    assert metrics.accuracy(predictions, targets) == sum(p == t for p, t in pairs) / len(pairs)
    expected = np.mean([f1_of(c, predictions, targets) for c in np.union1d(predictions, targets)])
    assert metrics.macro_f1(predictions, targets) == pytest.approx(expected)
    assert metrics.matthews(predictions, targets) == pytest.approx(gorodkin(predictions, targets), abs=1e-12)


@given(PAIRS)
def test_f1_equals_its_definition(pairs: list[tuple[int, int]]) -> None:
    predictions, targets = columns(pairs)
    assert metrics.f1(predictions, targets) == pytest.approx(f1_of(1, predictions, targets))


@given(NUMBERS)
def test_pearson_lies_between_minus_1_and_1_and_equals_numpy(pairs: list[tuple[float, float]]) -> None:
    predictions, targets = columns(pairs)
    found = metrics.pearson(predictions, targets)
    assert -1 <= found <= 1
    if np.ptp(predictions) > 1e-3 and np.ptp(targets) > 1e-3:
        assert found == pytest.approx(np.corrcoef(predictions, targets)[0, 1], abs=1e-6)


@pytest.mark.parametrize("name", [*metrics.CLASSIFICATION_METRICS, *metrics.REGRESSION_METRICS])
def test_a_metric_is_finite_for_any_predictions(name: str) -> None:
    metric = {**metrics.CLASSIFICATION_METRICS, **metrics.REGRESSION_METRICS}[name]
    targets = np.array([0.0, 1, 1, 0])
    predictions = [np.zeros(4), np.ones(4), targets, 1 - targets]
    if name in metrics.REGRESSION_METRICS:
        predictions += [
            np.full(4, np.nan),
            np.array([np.inf, 0, 0, 0]),
            np.full(4, 1e300),
            np.array([1e300, 0, 0, 0]),
        ]
    for one in predictions:
        assert math.isfinite(metric(one, targets))
        assert math.isfinite(metric(one, np.zeros(4)))
    if name in ("matthews", "pearson"):
        assert metric(np.ones(4), targets) == 0.0  # constant predictions score 0
        assert metric(targets, np.ones(4)) == 0.0
        assert metric(np.full(4, 0.1), targets) == 0.0  # also when their mean is rounded
    if name == "f1":
        assert metric(np.zeros(4), np.zeros(4)) == 0.0


def test_large_predictions_do_not_overflow() -> None:
    predictions, targets = np.array([1e300, 2e300, 3e300]), np.array([1.0, 2, 3])
    assert metrics.pearson(predictions, targets) == pytest.approx(1)


def test_a_metric_that_does_not_suit_the_output_is_refused() -> None:
    task = Reviews()
    assert metrics.get_metric(task) is metrics.accuracy
    for name, hint in (("acuracy", "'accuracy'"), ("pearson", "Choose from"), ("f1", "use macro_f1")):
        task.metric = name  # type: ignore[misc]
        with pytest.raises(UsageError, match=hint):
            metrics.get_metric(task)
    assert not Letters().has_head
