from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import pytest

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
