from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.learning_rate import factor, warmup_steps
from orchestrator.study.configuration import Schedule

schedules = st.builds(
    Schedule,
    steps=st.integers(1, 400),
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 1),
)


@given(schedules)
def test_rises_to_the_peak_then_never_rises(schedule: Schedule) -> None:
    factors = [factor(schedule, step) for step in range(schedule.steps)]
    warm = warmup_steps(schedule)
    assert all(0 < f <= 1 for f in factors)
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert max(factors) == 1.0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_and_only_warmup(name: str, warmup: float) -> None:
    schedule = Schedule(steps=4, name=name, warmup=warmup)  # type: ignore[arg-type]
    if warmup == 1.0:
        assert [factor(schedule, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    else:
        assert factor(schedule, 0) == 1.0


def test_values_by_hand() -> None:
    linear = Schedule(steps=10, name="linear", warmup=0.2)
    assert [factor(linear, s) for s in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = Schedule(steps=12, name="cosine", warmup=1 / 6)
    assert factor(cosine, 7) == pytest.approx(0.5)
    assert factor(cosine, 11) == pytest.approx((1 + math.cos(math.pi * 0.9)) / 2)
    assert [factor(Schedule(steps=10, name="constant", warmup=0.1), s) for s in range(3)] == [1.0, 1.0, 1.0]


def test_warmup_is_rounded_up_but_not_by_rounding_errors() -> None:
    assert warmup_steps(Schedule(steps=100, warmup=0.07)) == 7
    assert warmup_steps(Schedule(steps=60, warmup=0.05)) == 3
    assert warmup_steps(Schedule(steps=10, warmup=0.11)) == 2
    assert warmup_steps(Schedule(steps=1, warmup=0.001)) == 1


@pytest.mark.parametrize("step", [-1, 10])
def test_refuses_steps_outside(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        factor(Schedule(steps=10), step)
