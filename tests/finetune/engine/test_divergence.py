from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.engine.divergence import DivergenceDetector
from orchestrator.study.configuration import DivergenceConfig, LRSchedule

RULE = DivergenceConfig(loss_ratio=1.5, share=0.1, smoothing=0.8)
SCHEDULE = LRSchedule(steps=50, warmup=0.1)  # 5 steps of warm-up, 5 steps of patience


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_reported_at_once_even_in_warmup(bad: float) -> None:
    assert "training loss" in (DivergenceDetector(RULE, SCHEDULE, 2.0).observe(0, bad, 1.0) or "")
    assert "gradient norm" in (DivergenceDetector(RULE, SCHEDULE, 2.0).observe(0, 1.0, bad) or "")


def test_a_loss_above_the_limit_for_a_tenth_of_the_steps_after_warmup_has_diverged() -> None:
    detector = DivergenceDetector(RULE, SCHEDULE, 2.0)
    results = [detector.observe(step, 3.01, 1.0) for step in range(10)]
    assert results[:9] == [None] * 9  # steps 0-4 are warm-up, steps 5-8 the first four above the limit
    assert "above 3" in (results[9] or "")


def test_exactly_at_the_limit_is_not_above() -> None:
    detector = DivergenceDetector(DivergenceConfig(loss_ratio=1.5, share=0.1, smoothing=0.0), SCHEDULE, 2.0)
    assert not any(detector.observe(step, 3.0, 1.0) for step in range(50))


def test_one_smoothed_step_below_starts_the_count_anew() -> None:
    detector = DivergenceDetector(DivergenceConfig(smoothing=0.0), SCHEDULE, 2.0)
    losses = [9.0] * 9 + [1.0] + [9.0] * 4
    assert not any(detector.observe(step, loss, 1.0) for step, loss in enumerate(losses))
    assert detector.observe(14, 9.0, 1.0)


def test_smoothing_is_the_weight_of_the_past() -> None:
    detector = DivergenceDetector(RULE, SCHEDULE, 2.0)
    for step, loss in enumerate([4.0, 2.0, 1.0]):
        detector.observe(step, loss, 1.0)
    assert detector.smoothed_loss == pytest.approx(0.8 * (0.8 * 4 + 0.2 * 2) + 0.2 * 1)


def test_a_single_step_schedule_has_a_patience_of_one() -> None:
    assert DivergenceDetector(RULE, LRSchedule(steps=1, warmup=0.0), 1.0).observe(0, 2.0, 1.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=49), st.data())
def test_state_through_json_changes_nothing(losses: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, first, second = (DivergenceDetector(RULE, SCHEDULE, 2.0) for _ in range(3))
    expected = [whole.observe(step, loss, 1.0) for step, loss in enumerate(losses)]
    found = [first.observe(step, loss, 1.0) for step, loss in enumerate(losses[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(cut + step, loss, 1.0) for step, loss in enumerate(losses[cut:])]
    assert found == expected
