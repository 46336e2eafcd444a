"""Each broken variant is detected by exactly one law, so no law is empty or redundant."""

from __future__ import annotations

import broken
import parity
import pytest
from references import REFERENCES

from variants.api import Variant
from variants.baseline.lora import LoRA
from variants.optimization.dora import DoRA
from variants.testing import CASES, LAWS, Case
from variants.testing.laws import find_broken_laws

BY_NAME = {case.name: case for case in CASES}
ONE, SEVERAL = BY_NAME["tall-bias-float32-one"], BY_NAME["wide-nobias-float32-several"]

MUTANTS: list[tuple[type[Variant], Case, str]] = [
    (broken.StartsElsewhere, SEVERAL, "starts_as_declared"),
    (broken.DeadTensor, SEVERAL, "every_tensor_gets_a_gradient"),
    (broken.MergesUnscaled, ONE, "merged_equals_forward"),
    (broken.RoundsTheBase, SEVERAL, "removal_restores_the_base"),
    (broken.MovesFrozen, ONE, "frozen_stays_frozen"),
    (broken.ForgetsFrozen, SEVERAL, "saved_lane_is_restored"),
    (broken.LeaksBetweenLanes, SEVERAL, "lanes_are_independent"),
    (broken.ScalesAcrossExperts, SEVERAL, "lanes_are_independent"),
    (broken.CountsWrong, ONE, "parameter_count_follows_from_shapes"),
    (broken.GoesUphill, SEVERAL, "fits_a_representable_target"),
    (broken.ExportsWrongAlpha, SEVERAL, "export_loads_in_peft"),
]


FEW = ("lanes_are_independent", "merged_equals_forward", "saved_lane_is_restored")
"""The laws whose broken variants the default run checks; all laws run to show that one alone is broken."""


@pytest.mark.parametrize(
    ("kind", "case", "law"),
    [
        pytest.param(*mutant, id=mutant[2], marks=() if mutant[2] in FEW else pytest.mark.slow)
        for mutant in MUTANTS
    ],
)
def test_a_broken_variant_breaks_one_law_only(kind: type[Variant], case: Case, law: str) -> None:
    assert [name for name, _ in find_broken_laws(kind(), case)] == [law]


def test_every_law_has_a_broken_variant() -> None:
    assert {law for _, _, law in MUTANTS} == set(LAWS)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(broken.AttachedNorm, REFERENCES["dora"]), (broken.GoesUphill, REFERENCES["lora"])],
)
def test_parity_detects_a_broken_variant(kind: type[Variant], reference: parity.Reference) -> None:
    with pytest.raises(AssertionError, match="step"):
        parity.compare_steps(kind(), reference, "llama")


@pytest.mark.parametrize(("kind", "name"), [(LoRA, "dora"), (DoRA, "rslora")])
def test_parity_detects_another_method(kind: type[Variant], name: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        parity.compare_steps(kind(), REFERENCES[name], "llama")
