"""The slope of the best rate over a factor, and which runs belong to a curve."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from configurations import template
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analyze import transfer
from orchestrator.analyze.ratios import Optimum
from orchestrator.study import levels
from orchestrator.study.configuration import Configuration
from orchestrator.study.levels import LINKS, at_level, is_on_curve, level_of

LINKED = [(factor, link) for link, each in LINKS.items() for factor in each.moved if factor != levels.TARGETS]


@given(st.floats(-2, 2), st.lists(st.floats(-3, 0), min_size=3, max_size=8), st.floats(0.05, 0.5))
def test_the_slope_of_powers_is_exact_and_its_error_that_of_a_mean_and_of_the_grid(
    slope: float, shifts: list[float], step: float
) -> None:
    """A shift of all levels by a seed leaves the slope; a shift of the power itself has the t interval."""
    positions = [2.0, 4.0, 8.0, 16.0]
    logs, moved = np.log10(positions), np.array(shifts)
    without = (moved.sum() - moved) / (len(moved) - 1)
    grid = step / 2 / math.sqrt(np.square(logs - logs.mean()).sum())
    both = [
        [
            Optimum(slope * x, dict(enumerate(slope * x + by * without)), "", step)
            for x, by in zip(logs, scale, strict=True)
        ]
        for scale in (np.ones(4), logs)
    ]
    found = transfer.slope_interval(positions, both[0])
    assert found.mean == pytest.approx(slope, abs=1e-9)
    assert found.high - slope == pytest.approx(grid, rel=1e-6), "no seed changes the slope"
    found, mean = transfer.slope_interval(positions, both[1]), transfer.stats.mean_interval(moved)
    if math.isfinite(mean.low) and np.ptp(moved) > 1e-6:
        assert found.high - slope == pytest.approx(math.hypot((mean.high - mean.low) / 2, grid), rel=1e-6)


@pytest.mark.parametrize(("factor", "link"), LINKED)
@given(power=st.integers(-2, 3))
def test_a_curve_has_the_levels_of_its_link_alone(factor: str, link: str, power: int) -> None:
    start = template()
    value = level_of(start, factor)
    assert isinstance(value, int)
    other = max(1, int(value * 2**power))
    on_curve = at_level(start, factor, other, link, other / value)
    off_curve = at_level(start, factor, other, levels.NO_LINK, other / value)
    assert on_curve is not None
    assert off_curve is not None
    assert is_on_curve(start, on_curve, factor, link)
    assert is_on_curve(start, off_curve, factor, link) == (on_curve == off_curve)
    assert not is_on_curve(start, replace(on_curve, base_dropout="on"), factor, link)


def test_base_models_are_one_curve() -> None:
    def of(name: str) -> Configuration:
        return replace(template(), model=replace(template().model, name=name, content=name))

    assert is_on_curve(of("a"), of("b"), "model", "none")
    assert not is_on_curve(of("a"), replace(of("b"), evaluations=9), "model", "none")
