"""Eligibility of points with stopped runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analyze.censored import PointOutcome, eligible_points

SCORES = st.floats(0, 1)
POINTS = st.lists(st.builds(PointOutcome, st.lists(SCORES, max_size=4), st.integers(0, 4)), max_size=6)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([([0.5, 0.5], 0), ([0.6, 0.6], 0)], [True, True]),
        # The second point reaches at least 0.45, the first one has 0.5.
        ([([0.5, 0.5], 0), ([0.9], 1)], [True, False]),
        # The scheduler stopped no run of the worst point.
        ([([0.0, 0.0], 0), ([0.9], 1)], [True, True]),
        # The second point reaches at least 0.45, which is not better than the first one.
        ([([0.45, 0.45], 0), ([0.9], 1)], [True, False]),
        ([([0.9, 0.8], 1), ([0.9, 0.9], 1), ([1.0], 2)], [False, True, False]),
        ([([0.9, 0.9], 1), ([0.9, 0.9], 1)], [True, True]),
        # All runs of the first point were stopped, all runs of the second one failed.
        ([([], 3), ([], 0)], [False, False]),
        # One run diverged and the others were stopped, so that no score is above the floor.
        ([([0.0], 2), ([], 3)], [False, False]),
        ([([0.0, 0.0], 0), ([0.0], 2)], [True, False]),
    ],
)
def test_a_point_with_stopped_runs_is_eligible_if_no_outcome_of_them_could_change_the_choice(
    points: list[tuple[list[float], int]], expected: list[bool]
) -> None:
    assert eligible_points([PointOutcome(scores, stopped) for scores, stopped in points], 0.0) == expected


def test_the_floor_is_the_tasks_own() -> None:
    points = [PointOutcome([0.5, 0.5], 0), PointOutcome([0.9], 1)]
    assert eligible_points(points, 0.3) == [True, True]


@given(points=POINTS, data=st.data())
def test_the_choice_beats_every_complete_point_whatever_its_stopped_runs_would_have_scored(
    points: list[PointOutcome], data: st.DataObject
) -> None:
    eligible = eligible_points(points, 0.0)
    complete_means = [p.pessimistic_mean(0.0) for p in points if p.scores and not p.num_stopped]
    for point, usable in zip(points, eligible, strict=True):
        if point.scores and not point.num_stopped:
            assert usable
        elif usable:
            final_scores = [data.draw(SCORES) for _ in range(point.num_stopped)]
            mean = (sum(point.scores) + sum(final_scores)) / (len(point.scores) + point.num_stopped)
            assert all(mean > other for other in complete_means)
    if any(point.num_stopped == 0 or max(point.scores) > 0.1 for point in points if point.scores):
        assert any(eligible)
