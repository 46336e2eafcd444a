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
def test_while_answers_are_slow_requests_are_less_frequent_up_to_two_seconds(
    took: float, wait: float
) -> None:
    interval = PollInterval(0.1)
    interval.record_answer(5.0, 5.0 + took)
    assert not interval.is_due(10.0, 10.0 + 0.99 * wait)
    assert interval.is_due(10.0, 10.0 + 1.01 * wait)


@given(seconds=SECONDS, took=SECONDS, since=SECONDS)
def test_a_request_is_due_no_sooner_than_the_interval_and_not_much_later(
    seconds: float, took: float, since: float
) -> None:
    interval = PollInterval(seconds)
    interval.record_answer(0.0, took)
    due = interval.is_due(0.0, since)
    assert not due or since >= seconds
    assert due or since < MAX_SLOWDOWN * seconds


def test_once_answers_are_fast_again_requests_are_as_frequent_as_before() -> None:
    interval = PollInterval(0.1)
    interval.record_answer(0.0, 1.0)
    interval.record_answer(0.0, 0.1 / LATENCY_FACTOR)
    assert interval.is_due(0.0, 0.1)


def test_with_an_interval_of_zero_a_request_is_always_due() -> None:
    interval = PollInterval(0.0)
    interval.record_answer(0.0, 9.0)
    assert interval.is_due(0.0, 0.0)
