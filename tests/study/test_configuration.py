from __future__ import annotations

import hashlib
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from configurations import read_configuration, template
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from orchestrator.study import configuration
from orchestrator.study.configuration import (
    Configuration,
    LRSchedule,
    OptimizerConfig,
    lr_factor,
    warmup_steps,
)
from orchestrator.util.atomic_files import canonical_json

POINT = template(rate=1e-3, svd="exact")


def test_a_configuration_survives_json_and_pickle() -> None:
    for copy in (
        read_configuration(json.loads(canonical_json(POINT.to_json()))),
        pickle.loads(pickle.dumps(POINT)),
    ):
        assert copy == POINT
        assert copy.fingerprint == POINT.fingerprint


def test_equal_values_of_different_types_have_one_fingerprint() -> None:
    with_int = replace(POINT, variant=replace(POINT.variant, alpha=16))  # This is an int instead of a float.
    assert with_int.fingerprint == POINT.fingerprint


def test_a_head_learning_rate_equal_to_the_learning_rate_changes_no_fingerprint() -> None:
    with_head_rate = replace(POINT, optimizer=OptimizerConfig(1e-3, head_learning_rate=1e-3))
    assert with_head_rate.fingerprint == POINT.fingerprint


def test_a_base_model_is_identified_by_its_content_and_not_by_its_name() -> None:
    renamed = replace(POINT, model=replace(POINT.model, name="/models/letters"))
    assert renamed.fingerprint == POINT.fingerprint
    assert renamed.group_key == POINT.group_key


NAMED = [each for each in configuration.FIELDS if (each.part, each.field) != ("model", "name")]
every_field = pytest.mark.parametrize("each", NAMED, ids=lambda each: f"{each.part} {each.field}")


def changed(each: configuration.Field) -> Configuration:
    """Return POINT with another value of a field."""
    part = getattr(POINT, each.part) if each.part else POINT
    old = getattr(part, each.field)
    value: object = next((choice for choice in each.choices if choice != old), f"{old}x")
    if each.field == "extra":
        value = {"svd": 16}
    elif each.value_type is not str:
        value = each.value_type((old or 0) + 1)
    other = replace(part, **{each.field: value})
    return replace(POINT, **{each.part: other}) if each.part else other


@every_field
def test_every_field_changes_the_fingerprint(each: configuration.Field) -> None:
    assert changed(each).fingerprint != POINT.fingerprint


@every_field
def test_the_group_key_changes_with_everything_that_may_not_differ_in_a_lane_group(
    each: configuration.Field,
) -> None:
    may_differ = each.part in ("optimizer", "lr_schedule", "divergence") or each.field in (
        "alpha", "evaluations", "test_evaluations", "seed",
    )  # fmt: skip
    assert (changed(each).group_key == POINT.group_key) == may_differ


def test_a_new_field_with_its_default_changes_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """`clip_norm` stands for a field that was added after POINT had been trained."""
    added = [replace(each, omit_default=each.field == "clip_norm") for each in configuration.FIELDS]
    known = POINT.to_json()
    del known["optimizer"]["clip_norm"]
    known["optimizer"]["head_learning_rate"] = 1e-3
    known["model"]["name"] = ""
    monkeypatch.setattr(configuration, "FIELDS", added)
    read = read_configuration(known | {"model": POINT.to_json()["model"]})
    assert read.fingerprint == hashlib.sha256(canonical_json(known)).hexdigest()
    assert replace(read, optimizer=OptimizerConfig(1e-3, clip_norm=2.0)).fingerprint != read.fingerprint


def test_every_field_is_in_a_column() -> None:
    flat = POINT.to_columns()
    assert flat["variant"] == "lora"
    assert flat["learning_rate"] == 1e-3
    assert flat["variant_svd"] == "exact"
    assert flat["task_train_size"] == 960
    assert (flat["schedule"], flat["steps_horizon"], flat["divergence_share"]) == ("cosine", 60, 0.1)
    types = {name: each.value_type for name, each in configuration.COLUMNS.items()}
    assert all(value is None or type(value) is types[name] for name, value in flat.items() if name in types)
    assert flat.keys() - types.keys() == {"variant_svd"}
    for each in configuration.FIELDS:
        in_no_column = each.part == "task" and each.field in ("metric", "floor")
        assert (changed(each).to_columns() == flat) == in_no_column, each.field


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


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine to a tenth"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(20, 0.2), (60, 0.05), (1562, 0.03), (5, 0.0), (7, 0.99), (4, 1.0)]
)
def test_the_factors_are_those_of_transformers_schedules(name: str, steps: int, warmup: float) -> None:
    """The survey's cosine ends at a tenth of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRSchedule(steps, name.split()[0], warmup, 0.1 if " " in name else 0.0)  # type: ignore[arg-type]
    full_name = {"constant": "constant_with_warmup", "cosine to a tenth": "cosine_with_min_lr"}.get(
        name, name
    )
    end = {"min_lr_rate": 0.1} if " " in name else None
    theirs = get_scheduler(full_name, optimizer, warmup_steps(schedule), steps, end)
    for step in range(steps):
        assert lr_factor(schedule, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_ends_at_its_final_factor(name: str) -> None:
    schedule = LRSchedule(1562, name, 0.03, final_factor=0.1)  # type: ignore[arg-type]
    assert lr_factor(schedule, 1561) == pytest.approx(0.1, abs=1e-3)


def test_warmup_is_rounded_up_but_not_by_rounding_errors() -> None:
    assert warmup_steps(LRSchedule(steps=100, warmup=0.07)) == 7
    assert warmup_steps(LRSchedule(steps=60, warmup=0.05)) == 3
    assert warmup_steps(LRSchedule(steps=10, warmup=0.11)) == 2
    assert warmup_steps(LRSchedule(steps=1, warmup=0.001)) == 1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rank", 0, "must be 1 or more"),
        ("rank", 8.0, None),
        ("rank", 2.9999999999, "must be a whole number"),
        ("rank", 1e300, "must be 100000 or less; take 100000"),
        ("rank", True, "must be a number"),
        ("rank", "8", "must be a number"),
        ("learning_rate", 1, None),
        ("learning_rate", 0, "must be above 0"),
        ("learning_rate", math.inf, "must be a finite number"),
        ("learning_rate", math.nan, "must be a finite number"),
        ("dropout", 1, "must be below 1"),
        ("schedule", "step", "must be one of constant, linear, cosine"),
        ("targets", "", "must be a text"),
    ],
)
def test_a_value_breaks_a_bound_of_its_hyperparameter(name: str, value: object, rule: str | None) -> None:
    assert configuration.HYPERPARAMETERS[name].find_violation(value) == rule
