from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from orchestrator.study import configuration
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    DivergenceConfig,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
    lr_factor,
    warmup_steps,
)
from orchestrator.util.atomic_files import canonical_json

POINT = Configuration(
    VariantChoice("lora", alpha=16.0, extra={"svd": "exact"}),
    TaskChoice("letters", "r0", 96, 32, 32, "exact_match", 0.0),
    ModelChoice("letters-base", "c0"),
    OptimizerConfig(1e-3),
    LRSchedule(60),
    BatchConfig(16),
)


def test_a_configuration_survives_json_and_pickle() -> None:
    for copy in (
        Configuration.from_json(json.loads(canonical_json(POINT.to_json()))),
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


CHANGES = {
    "learning rate": replace(POINT, optimizer=OptimizerConfig(2e-3)),
    "decay": replace(POINT, optimizer=OptimizerConfig(1e-3, weight_decay=0.1)),
    "the head's rate": replace(POINT, optimizer=OptimizerConfig(1e-3, head_learning_rate=1e-2)),
    "alpha": replace(POINT, variant=replace(POINT.variant, alpha=8.0)),
    "schedule": replace(POINT, lr_schedule=LRSchedule(60, "linear")),
    "the schedule's end": replace(POINT, lr_schedule=LRSchedule(60, final_factor=0.1)),
    "horizon": replace(POINT, lr_schedule=LRSchedule(30)),
    "seed": replace(POINT, seed=1),
    "divergence rule": replace(POINT, divergence=DivergenceConfig(2.0)),
    "evaluations": replace(POINT, evaluations=2),
    "rank": replace(POINT, variant=replace(POINT.variant, rank=4)),
    "variant": replace(POINT, variant=replace(POINT.variant, name="rslora")),
    "its own settings": replace(POINT, variant=replace(POINT.variant, extra={"svd": 16})),
    "targets": replace(POINT, variant=replace(POINT.variant, targets="q_proj")),
    "dropout": replace(POINT, variant=replace(POINT.variant, dropout=0.1)),
    "batch": replace(POINT, batches=BatchConfig(8)),
    "dtype": replace(POINT, model=replace(POINT.model, dtype="bfloat16")),
    "base": replace(POINT, model=replace(POINT.model, content="c1")),
    "data": replace(POINT, task=replace(POINT.task, revision="r1")),
    "variant numerics": replace(POINT, variant=replace(POINT.variant, numerics=2)),
    "task numerics": replace(POINT, task=replace(POINT.task, numerics=2)),
    "loop numerics": replace(POINT, loop_numerics=POINT.loop_numerics + 1),
    "the base's dropout": replace(POINT, base_dropout="on"),
}
MAY_DIFFER_IN_A_LANE_GROUP = {
    "learning rate", "the head's rate", "decay", "alpha", "schedule", "the schedule's end", "horizon", "seed",
    "divergence rule", "evaluations",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_field_that_changes_the_numbers_changes_the_fingerprint(change: str) -> None:
    assert CHANGES[change].fingerprint != POINT.fingerprint


@pytest.mark.parametrize("change", CHANGES)
def test_the_group_key_changes_with_everything_that_may_not_differ_in_a_lane_group(change: str) -> None:
    assert (CHANGES[change].group_key == POINT.group_key) == (change in MAY_DIFFER_IN_A_LANE_GROUP)


def test_a_new_field_with_its_default_changes_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """`clip_norm` stands for a field that was added after POINT had been trained."""
    added = [replace(each, omit_default=each.field == "clip_norm") for each in configuration.FIELDS]
    known = POINT.to_json()
    del known["optimizer"]["clip_norm"]
    known["optimizer"]["head_learning_rate"] = 1e-3
    known["model"]["name"] = ""
    monkeypatch.setattr(configuration, "FIELDS", added)
    read = Configuration.from_json(known | {"model": POINT.to_json()["model"]})
    assert read.fingerprint == hashlib.sha256(canonical_json(known)).hexdigest()
    assert replace(read, optimizer=OptimizerConfig(1e-3, clip_norm=2.0)).fingerprint != read.fingerprint


def test_every_field_is_in_a_column() -> None:
    flat = POINT.to_columns()
    assert flat["variant"] == "lora"
    assert flat["learning_rate"] == 1e-3
    assert flat["variant_svd"] == "exact"
    assert flat["task_train_size"] == 96
    assert (flat["schedule"], flat["steps_horizon"], flat["divergence_share"]) == ("cosine", 60, 0.1)
    types = configuration.column_types()
    assert all(value is None or type(value) is types[name] for name, value in flat.items() if name in types)
    assert flat.keys() - types.keys() == {"variant_svd"}
    for what, changed in CHANGES.items():
        assert changed.to_columns() != flat, f"{what} is in no column"


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
