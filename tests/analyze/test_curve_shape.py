"""Statistics of a curve: values computed by hand, and invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analyze import curve_shape

X = [-4.0, -3.0, -2.0, -1.0]

curves = st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=3, max_size=9)


def test_the_best_is_the_highest_and_the_lowest_rate_among_equals() -> None:
    assert curve_shape.best_index([0.1, 0.9, 0.9, 0.2]) == 1
    assert curve_shape.best_index([None, 0.3, None]) == 1
    assert curve_shape.best_index([None]) is None


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ([0.1, 0.9, 0.2], "yes"),
        ([0.9, 0.5, 0.2], "low edge"),
        ([0.1, 0.5, 0.9], "high edge"),
        ([0.1, 0.9, 0.9], "high edge"),  # The edge scores the same, so the best may lie beyond it.
        ([0.0, 0.0, 0.0], "both edges"),
        ([None, 0.9, None], "yes"),  # Rates that were stopped early count as worse.
    ],
)
def test_the_best_rate_is_bracketed_unless_an_end_of_the_grid_scores_the_same(
    y: list[float | None], expected: str
) -> None:
    best = curve_shape.best_index(y)
    assert best is not None
    assert curve_shape.bracket_status(y, best) == expected


def test_the_parabola_agrees_with_a_fit_on_an_uneven_grid() -> None:
    x, y = [-3.0, -2.52, -2.0], [0.4, 0.9, 0.7]
    a, b, _ = np.polyfit(x, y, 2)
    assert curve_shape.parabola_peak(x, y, 1) == pytest.approx(-b / (2 * a))
    assert curve_shape.parabola_peak(x, y, 0) is None
    assert curve_shape.parabola_peak(x, [None, 0.9, 0.7], 1) is None
    assert curve_shape.parabola_peak(x, [0.5, 0.5, 0.5], 1) is None


def test_the_score_is_linear_between_rates_and_unknown_beside_a_stopped_one() -> None:
    y = [0.0, 0.4, 0.8, None]
    assert curve_shape.score_at(X, y, -2.5) == pytest.approx(0.6)
    assert curve_shape.score_at(X, y, -2.0) == 0.8
    assert curve_shape.score_at(X, y, -1.5) is None
    assert curve_shape.score_at(X, y, -1.0) is None
    assert curve_shape.score_at(X, y, -5.0) is None
    assert curve_shape.score_at(X, y, 0.0) is None


def test_width_by_hand() -> None:
    # The best score is .8 at -2. The score .7 is a quarter of the way to .4 and an eighth of the way to 0.
    found, is_lower_bound = curve_shape.width(X, [0.0, 0.4, 0.8, 0.0], 2, 0.7)
    assert found == pytest.approx(0.25 + 0.125)
    assert not is_lower_bound


def test_a_width_up_to_the_end_of_the_grid_or_a_stopped_rate_is_a_lower_bound() -> None:
    assert curve_shape.width(X, [0.0, 0.4, 0.8, 0.79], 2, 0.6) == (pytest.approx(1.5), True)
    assert curve_shape.width(X, [0.0, 0.4, 0.8, None], 2, 0.6) == (pytest.approx(0.5), True)
    assert curve_shape.width([-3.0], [0.5], 0, 0.4) == (0.0, True)


def test_a_score_exactly_one_point_below_the_best_is_within_one_point_despite_rounding() -> None:
    # Without a tolerance for rounding, the two scores of .09 would be too low by 1e-17.
    assert 0.1 - 0.01 > 0.09
    assert curve_shape.width(X, [0.09, 0.09, 0.1, 0.0], 2, 0.1 - 0.01) == (pytest.approx(2.1), True)


def test_rounding_decides_no_tie_no_edge_and_no_cliff() -> None:
    almost = 0.1 + 0.2  # .30000000000000004
    assert curve_shape.best_index([0.3, almost, 0.1]) == 0
    assert curve_shape.bracket_status([0.3, almost, 0.1], 1) == "low edge"
    assert curve_shape.cliff_index([almost + 0.3, almost], [0.0, 0.0], 0, 0.0) == 1
    # Half of .6 is .3, which is less than `almost` by rounding only.
    assert curve_shape.cliff_index([0.6, almost], [0.0, 0.0], 0, 0.0) == 1
    # The best score exceeds the floor by rounding only.
    assert curve_shape.cliff_index([almost, 0.0], [0.0, 0.0], 0, 0.3) is None


def test_a_second_hill_beyond_a_dip_does_not_widen() -> None:
    assert curve_shape.width([-4, -3, -2, -1, 0], [0.0, 0.8, 0.0, 0.79, 0.0], 1, 0.4)[0] == pytest.approx(1.0)


def test_half_decade_regret_by_hand() -> None:
    # The score falls by .4 per decade to the left and by .8 to the right. The mean loss over half a decade is
    # .1 on the left and .2 on the right, and .15 over both.
    found = curve_shape.mean_regret(X, [0.0, 0.4, 0.8, 0.0], 2)
    assert found == (pytest.approx((0.1 + 0.2) / 2), pytest.approx(1.0))
    assert curve_shape.mean_regret(X, [0.0, 0.4, 0.8], 2) == (pytest.approx(0.1), pytest.approx(0.5))
    assert curve_shape.mean_regret([-3.0], [0.8], 0) is None


def test_half_decade_regret_integrates_through_every_rate_in_its_range() -> None:
    x, y = [-1.0, -0.75, -0.5, 0.0, 0.5], [0.0, 0.1, 0.3, 1.0, 0.2]
    inside = np.linspace(-0.5, 0.5, 100_001)
    expected = 1.0 - float(np.trapezoid(np.interp(inside, x, y), inside))
    assert curve_shape.mean_regret(x, y, 3) == (pytest.approx(expected, abs=1e-6), pytest.approx(1.0))


def test_the_cliff_is_the_first_rate_above_the_best_at_which_training_breaks_down() -> None:
    y, no_divergence = [0.2, 0.8, 0.5, 0.1], [0.0] * 4
    assert curve_shape.cliff_index(y, no_divergence, 1, 0.0) == 3
    # With this floor, the score at index 2 has fallen half of the way.
    assert curve_shape.cliff_index(y, no_divergence, 1, 0.2) == 2
    assert curve_shape.cliff_index(y, [0.0, 0.0, 0.67, 1.0], 1, 0.0) == 2
    assert curve_shape.cliff_index([0.2, 0.8, 0.7], no_divergence, 1, 0.0) is None
    # No score is above the floor.
    assert curve_shape.cliff_index([0.0, 0.0, 0.0], no_divergence, 0, 0.0) is None


@given(curves, st.integers(1, 32).map(lambda n: n / 64), st.integers(-8, 8))
def test_a_constant_added_leaves_best_and_width_alone(
    y: list[float], tolerance: float, constant: int
) -> None:
    x = [0.5 * i for i in range(len(y))]
    raised = [v + constant for v in y]
    best = curve_shape.best_index(y)
    assert best is not None
    assert curve_shape.best_index(raised) == best
    assert curve_shape.width(x, raised, best, raised[best] - tolerance) == curve_shape.width(
        x, y, best, y[best] - tolerance
    )


@given(curves, st.integers(1, 31).map(lambda n: n / 64))
def test_a_larger_tolerance_never_narrows(y: list[float], tolerance: float) -> None:
    x = [0.5 * i for i in range(len(y))]
    best = curve_shape.best_index(y)
    assert best is not None
    narrow, wide = (curve_shape.width(x, y, best, y[best] - t)[0] for t in (tolerance, 2 * tolerance))
    assert 0 <= narrow <= wide + 1e-12
    assert wide <= x[-1] - x[0]


@given(curves)
def test_a_mirrored_curve_has_the_same_width_and_regret(y: list[float]) -> None:
    y = [*y, 2.0, *reversed(y[1:])]  # There is one peak, because the choice in a tie depends on the order.
    x = [0.3 * i for i in range(len(y))]
    best, mirrored = curve_shape.best_index(y), curve_shape.best_index(y[::-1])
    assert best is not None
    assert mirrored is not None
    for function in (
        lambda v, b: curve_shape.width(x, v, b, 1.9)[0],
        lambda v, b: curve_shape.mean_regret(x, v, b)[0],
    ):  # type: ignore[index]
        assert function(y, best) == pytest.approx(function(y[::-1], mirrored))
