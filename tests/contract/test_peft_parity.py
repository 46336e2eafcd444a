"""Ten optimizer steps of a variant equal ten steps of PEFT or, for the two controls, of plain AdamW.

The language models have layers of type Linear (Llama) and Conv1D (GPT-2).
"""

from __future__ import annotations

import broken
import parity
import pytest
from peft import get_peft_model
from references import ADALORA_FIXED_RANKS, OTHER_SETTINGS, REFERENCES, replace_extension

from variants import catalogue
from variants.api import Variant, VerifiedBy
from variants.baseline.lora import LoRA
from variants.optimization.dora import DoRA
from variants.peft_format import peft_method
from variants.testing.rig import Case


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=pytest.mark.slow if number else ())
        for name, reference in REFERENCES.items()
        for number, model in enumerate(reference.models)
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_ten_steps_equal_those_of_the_reference(name: str, model: str) -> None:
    parity.compare_steps(catalogue.get(name), REFERENCES[name], model)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        pytest.param(name, reference, id=f"{name}-{label}")
        for name, settings in OTHER_SETTINGS.items()
        for label, reference in settings.items()
    ],
)
def test_ten_steps_with_other_settings_equal_those_of_peft(
    name: str, reference: parity.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_extension(monkeypatch)
    parity.compare_steps(catalogue.get(name), reference, "llama")


@pytest.mark.parametrize("model", parity.LANGUAGE_MODELS)
def test_adalora_with_fixed_ranks_equals_peft(model: str) -> None:
    ours = parity.compare_steps(catalogue.get("adalora"), ADALORA_FIXED_RANKS, model)
    ranks = ours.ranks_in_use("0").values()
    assert sum(ranks) == len(ranks) * parity.RANK
    assert len(set(ranks)) > 1


def test_variants_verified_by_a_reference_implementation_are_compared_with_one() -> None:
    verified = {
        name
        for name in catalogue.names()
        if catalogue.get(name).verified_by == VerifiedBy.REFERENCE_IMPLEMENTATION
    }
    assert verified == set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
def test_peft_refuses_conv1d_exactly_where_the_variant_says_so(name: str) -> None:
    peft, config = peft_method(catalogue.get(name)), REFERENCES[name].config
    if peft is None or config is None:
        pytest.skip("without PEFT's method")
    if config(["c_attn"]).peft_type != peft.peft_type:
        pytest.skip(f"{name} is exported as {peft.peft_type}")
    if peft.adapts_conv1d:
        assert "gpt2" in REFERENCES[name].models
        return
    with pytest.raises((TypeError, ValueError), match=r"[Uu]nsupported|not supported|not implemented"):
        get_peft_model(Case("gpt2", model="gpt2").build(), config(["c_attn"]))


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
