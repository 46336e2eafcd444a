from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.tasks.local.letters import Letters
from orchestrator.finetune.tasks.local.reviews import Reviews
from orchestrator.util.errors import UsageError

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)
PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
NUMBERS = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3, allow_subnormal=False)), min_size=2, max_size=60
)


def columns(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    said, truth = zip(*pairs, strict=True)
    return np.array(said, dtype=float), np.array(truth, dtype=float)


def test_by_hand() -> None:
    said, truth = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert metrics.accuracy(said, truth) == 0.6
    assert metrics.f1(said, truth) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.macro_f1(said, truth) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2*1 - 1*1) / sqrt(3*3*2*2)
    assert metrics.matthews(said, truth) == pytest.approx(1 / 6)
    assert metrics.pearson(np.array([1.0, 2, 3, 5]), np.array([2.0, 4, 6, 10])) == pytest.approx(1)
    assert metrics.pearson(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert metrics.pearson(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(CLASSES)
def test_classes_as_scikit_learn_counts_them(pairs: list[tuple[int, int]]) -> None:
    said, truth = columns(pairs)
    assert metrics.accuracy(said, truth) == pytest.approx(accuracy_score(truth, said))
    assert metrics.macro_f1(said, truth) == pytest.approx(
        f1_score(truth, said, average="macro", zero_division=0)
    )
    assert metrics.matthews(said, truth) == pytest.approx(matthews_corrcoef(truth, said), abs=1e-12)


@given(PAIRS)
def test_two_classes_as_scikit_learn_counts_them(pairs: list[tuple[int, int]]) -> None:
    said, truth = columns(pairs)
    assert metrics.f1(said, truth) == pytest.approx(f1_score(truth, said, pos_label=1, zero_division=0))


@given(NUMBERS)
def test_a_correlation_lies_where_it_should_and_is_scipys_where_both_vary(
    pairs: list[tuple[float, float]],
) -> None:
    said, truth = columns(pairs)
    found = metrics.pearson(said, truth)
    assert -1 <= found <= 1
    if np.ptp(said) > 1e-3 and np.ptp(truth) > 1e-3:
        assert found == pytest.approx(pearsonr(said, truth).statistic, abs=1e-6)


@pytest.mark.parametrize("name", [*metrics.CLASSIFICATION_METRICS, *metrics.REGRESSION_METRICS])
def test_whatever_is_said_the_metric_is_a_finite_number(name: str) -> None:
    metric = {**metrics.CLASSIFICATION_METRICS, **metrics.REGRESSION_METRICS}[name]
    truth = np.array([0.0, 1, 1, 0])
    said = [np.zeros(4), np.ones(4), truth, 1 - truth]
    if name in metrics.REGRESSION_METRICS:
        said += [
            np.full(4, np.nan),
            np.array([np.inf, 0, 0, 0]),
            np.full(4, 1e300),
            np.array([1e300, 0, 0, 0]),
        ]
    for one in said:
        assert math.isfinite(metric(one, truth))
        assert math.isfinite(metric(one, np.zeros(4)))
    if name in ("matthews", "pearson"):
        assert metric(np.ones(4), truth) == 0.0  # a guess
        assert metric(truth, np.ones(4)) == 0.0
        assert metric(np.full(4, 0.1), truth) == 0.0  # 0.1 has no exact mean
    if name == "f1":
        assert metric(np.zeros(4), np.zeros(4)) == 0.0


def test_a_large_number_is_not_lost() -> None:
    said, truth = np.array([1e300, 2e300, 3e300]), np.array([1.0, 2, 3])
    assert metrics.pearson(said, truth) == pytest.approx(1)


def test_a_metric_that_does_not_fit_the_answers_is_refused() -> None:
    task = Reviews()
    assert metrics.get_metric(task) is metrics.accuracy
    for name, hint in (("acuracy", "'accuracy'"), ("pearson", "Choose from"), ("f1", "use macro_f1")):
        task.metric = name  # type: ignore[misc]
        with pytest.raises(UsageError, match=hint):
            metrics.get_metric(task)
    assert not Letters().has_head
