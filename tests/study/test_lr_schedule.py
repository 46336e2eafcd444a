from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from orchestrator.study.configuration import LRSchedule, lr_factor, warmup_steps

schedules = st.builds(
    LRSchedule,
    steps=st.integers(1, 400),
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 1),
    final_factor=st.floats(0, 1, exclude_max=True),
)


@given(schedules)
def test_the_factor_rises_from_zero_to_the_peak_and_never_rises_afterwards(schedule: LRSchedule) -> None:
    factors = [lr_factor(schedule, step) for step in range(schedule.steps)]
    warm = warmup_steps(schedule)
    assert all(0 <= f <= 1 for f in factors)
    assert all(factors[1:]), "only the first step of a warm-up is taken at rate zero"
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert factors[0] == (0.0 if warm else 1.0)
    assert warm == schedule.steps or factors[warm] == 1.0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.2), (60, 0.05), (1562, 0.03), (5, 0.0), (7, 0.99)])
def test_the_factors_are_those_of_transformers_schedules(name: str, steps: int, warmup: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = LRSchedule(steps, name, warmup)  # type: ignore[arg-type]
    full_name = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(full_name, optimizer, warmup_steps(schedule), steps)
    for step in range(steps):
        assert lr_factor(schedule, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_ends_at_its_final_factor(name: str) -> None:
    """The survey's cosine ends at a tenth of the peak. The formula is that of transformers."""
    steps = 1562
    schedule = LRSchedule(steps, name, 0.03, final_factor=0.1)  # type: ignore[arg-type]
    assert lr_factor(schedule, steps - 1) == pytest.approx(0.1, abs=1e-3)
    if name == "cosine":
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        theirs = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            warmup_steps(schedule),
            steps,
            scheduler_specific_kwargs={"min_lr_rate": 0.1},
        )
        for step in range(steps):
            assert lr_factor(schedule, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_and_only_warmup(name: str, warmup: float) -> None:
    schedule = LRSchedule(steps=4, name=name, warmup=warmup)  # type: ignore[arg-type]
    if warmup == 1.0:
        assert [lr_factor(schedule, s) for s in range(4)] == [0.0, 0.25, 0.5, 0.75]
    else:
        assert lr_factor(schedule, 0) == 1.0


def test_warmup_is_rounded_up_but_not_by_rounding_errors() -> None:
    assert warmup_steps(LRSchedule(steps=100, warmup=0.07)) == 7
    assert warmup_steps(LRSchedule(steps=60, warmup=0.05)) == 3
    assert warmup_steps(LRSchedule(steps=10, warmup=0.11)) == 2
    assert warmup_steps(LRSchedule(steps=1, warmup=0.001)) == 1
