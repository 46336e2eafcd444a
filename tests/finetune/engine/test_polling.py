from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.engine.polling import LATENCY_FACTOR, MAX_SLOWDOWN, PollInterval

SECONDS = st.floats(0, 1e3)


@pytest.mark.parametrize(
    ("took", "wait"),
    [(0.001, 0.1), (0.005, 0.1), (0.05, 1.0), (0.1, 2.0), (30.0, 2.0)],
)
def test_slow_answers_are_asked_for_less_often_up_to_two_seconds(took: float, wait: float) -> None:
    pace = PollInterval(0.1)
    pace.record_answer(5.0, 5.0 + took)
    assert not pace.is_due(10.0, 10.0 + 0.99 * wait)
    assert pace.is_due(10.0, 10.0 + 1.01 * wait)


@given(seconds=SECONDS, took=SECONDS, since=SECONDS)
def test_never_sooner_than_told_and_never_much_later(seconds: float, took: float, since: float) -> None:
    pace = PollInterval(seconds)
    pace.record_answer(0.0, took)
    due = pace.is_due(0.0, since)
    assert not due or since >= seconds
    assert due or since < MAX_SLOWDOWN * seconds


def test_once_answers_are_quick_again_it_is_asked_as_often_as_before() -> None:
    pace = PollInterval(0.1)
    pace.record_answer(0.0, 1.0)
    pace.record_answer(0.0, 0.1 / LATENCY_FACTOR)
    assert pace.is_due(0.0, 0.1)


def test_without_a_pause_it_is_asked_at_every_turn() -> None:
    pace = PollInterval(0.0)
    pace.record_answer(0.0, 9.0)
    assert pace.is_due(0.0, 0.0)
