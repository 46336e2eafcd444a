"""Each law catches the variant that breaks it, and no other law does: none of them is empty or doubled."""

from __future__ import annotations

import broken
import parity
import pytest
from laws import LAWS, concerns, holds
from rig import CASES, Case

from variants.base import Variant
from variants.baseline.lora import LoRA
from variants.optimization.dora import DoRA

BY_NAME = {case.name: case for case in CASES}
ONE, SEVERAL = BY_NAME["tall-bias-float32-one"], BY_NAME["wide-nobias-float32-several"]

BREAKS: list[tuple[type[Variant], Case, str]] = [
    (broken.StartsElsewhere, SEVERAL, "starts_at_the_base"),
    (broken.DeadTensor, SEVERAL, "every_tensor_gets_a_gradient"),
    (broken.MergesUnscaled, ONE, "merged_equals_forward"),
    (broken.RoundsTheBase, SEVERAL, "off_gives_the_base_back"),
    (broken.MovesFrozen, ONE, "frozen_stays_frozen"),
    (broken.ForgetsFrozen, SEVERAL, "saved_is_loaded"),
    (broken.LeaksBetweenLanes, SEVERAL, "lanes_do_not_notice_each_other"),
    (broken.ScalesAcrossExperts, SEVERAL, "lanes_do_not_notice_each_other"),
    (broken.CountsWrong, ONE, "counts_its_parameters"),
    (broken.GoesUphill, SEVERAL, "fits_what_it_can_represent"),
    (broken.ExportsWrongAlpha, SEVERAL, "export_loads_in_peft"),
]


@pytest.mark.parametrize(("kind", "case", "law"), BREAKS, ids=[law for _, _, law in BREAKS])
def test_breaks_one_law_only(kind: type[Variant], case: Case, law: str) -> None:
    broken_ones = [
        name for name in LAWS if concerns(LAWS[name], kind(), case) and not holds(LAWS[name], kind(), case)
    ]
    assert broken_ones == [law]


def test_every_law_has_its_breaker() -> None:
    assert {law for _, _, law in BREAKS} == set(LAWS)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(broken.AttachedNorm, parity.SETTINGS["dora"]), (broken.GoesUphill, parity.SETTINGS["lora"])],
)
def test_parity_bites(kind: type[Variant], settings: parity.Oracle) -> None:
    with pytest.raises(AssertionError, match="step"):
        parity.steps_alike(kind(), settings, "llama")


@pytest.mark.parametrize(("kind", "name"), [(LoRA, "dora"), (DoRA, "rslora")])
def test_parity_bites_another_method(kind: type[Variant], name: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        parity.steps_alike(kind(), parity.SETTINGS[name], "llama")
