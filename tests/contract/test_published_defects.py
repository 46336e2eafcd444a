"""Known defects of the survey's own code (LoRAFactory) are detected by a law or a check.

Each defect is put into a subclass of the variant. The law or the check accepts the variant and refuses the
subclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rule import init_layers, initial_tensors
from torch import Generator, Tensor

from variants.api import (
    FrozenLayer,
    InitialTensors,
    InitTogether,
    LayerRandom,
    Layers,
    Params,
    RandomOf,
    Variant,
    VariantSettings,
)
from variants.experts.goat import GOAT
from variants.experts.lora_moe import LoRAMoE
from variants.experts.mola import MoLA
from variants.initialization.milora import MiLoRA
from variants.initialization.nora import NoRA
from variants.optimization.sine_lora import SineLoRA
from variants.rank.adalora import AdaLoRA
from variants.rank.loha import LoHa
from variants.rank.melora import MELoRA
from variants.rank.pro_lora import PRoLoRA
from variants.rank.rand_lora import RandLoRA
from variants.testing import CASES, LAWS

ONE = next(case for case in CASES if case.name == "tall-bias-float32-one")


class BothFactorsZero(LoHa):
    """Both products start at zero, so no factor ever gets a gradient."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["B1"].zero_()
        return initial


class RandomScales(RandLoRA):
    """The scales l start from N(0, 1) and not at 0."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["l"].normal_(generator=random.generator("l"))
        return initial


class SineOfTheOutput(SineLoRA):
    """The sine is taken of the update's output and not of its weights."""

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        phase = layer.settings["frequency"] * (x @ params["A"].to(x.dtype).mT @ params["B"].to(x.dtype).mT)
        return base + (layer.scaling * phase.sin() / math.sqrt(layer.shape[0])).to(base.dtype)


class MergesWithoutE(AdaLoRA):
    """The merge leaves out the singular values E."""

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        return super().delta_weight({**params, "E": torch.ones_like(params["E"])}, layer)


class MergesWithoutSharedPart(PRoLoRA):
    """The merge leaves out the ranks that are made of copies."""

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        unshared = {name: t if name in UNSHARED else torch.zeros_like(t) for name, t in params.items()}
        return super().delta_weight(unshared, layer)


UNSHARED = ("A", "B")


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (BothFactorsZero, "every_tensor_gets_a_gradient"),
        (RandomScales, "starts_as_declared"),
        (SineOfTheOutput, "merged_equals_forward"),
        (MergesWithoutE, "merged_equals_forward"),
        (MergesWithoutSharedPart, "merged_equals_forward"),
    ],
)
def test_a_law_detects_the_defect(kind: type[Variant], law: str) -> None:
    LAWS[law](kind.__mro__[1](), ONE)
    with pytest.raises(AssertionError):
        LAWS[law](kind(), ONE)


def initialize(variant: Variant, rank: int = 8) -> tuple[FrozenLayer, InitialTensors]:
    settings = variant.validate_settings(VariantSettings(rank, 16.0))
    weight = torch.randn(64, 48, generator=Generator().manual_seed(0), dtype=torch.float64)
    layer = FrozenLayer("blocks.0.layer", weight, None).with_settings(settings)
    return layer, initial_tensors(variant, layer, settings, seed=1)


def check_kaiming(variant: Variant) -> None:
    """Check that A is Kaiming-uniform over the inputs that it reads (in MELoRA, those of its block)."""
    _, initial = initialize(variant)
    a = next(tensor for name, tensor in initial.trainable.items() if name in ("A", "A1"))
    inputs = a.shape[-1]
    assert a.abs().max() <= 1 / math.sqrt(inputs)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)


def check_smallest_triplets(variant: Variant) -> None:
    layer, initial = initialize(variant)
    product = variant.scaling(layer.settings) * initial.trainable["B"] @ initial.trainable["A"]
    expected = torch.linalg.svdvals(layer.weight)[-8:]
    torch.testing.assert_close(torch.linalg.svdvals(product)[:8], expected)
    rest = torch.linalg.svdvals(layer.weight - product)
    torch.testing.assert_close(rest[0], torch.linalg.svdvals(layer.weight)[0])


def check_rank(variant: Variant) -> None:
    layer, initial = initialize(variant)
    tensors = {**initial.trainable, **initial.frozen}
    inner = tensors["inner_B"] @ tensors["inner_A"]
    assert torch.linalg.matrix_rank(tensors["B"] @ inner @ tensors["A"]) == layer.settings.rank


def check_scale_of_experts(variant: Variant) -> None:
    """With gates that sum to 1, experts of rank 1 need s = alpha for the size of LoRA's update."""
    reference = LoRAMoE()
    settings = VariantSettings(8, 16.0)
    expected = reference.scaling(reference.validate_settings(settings))
    assert variant.scaling(variant.validate_settings(settings)) == expected


def normal_start(kind: type[Variant]) -> Variant:
    """Return the variant with A from N(0, 1): the name of the initialization was lost on the way."""

    class NormalStart(kind, InitTogether):  # type: ignore[misc, valid-type]
        def init_layers(self, layers: Layers, random_of: RandomOf) -> dict[str, InitialTensors]:
            initial = init_layers(kind(), layers, random_of)
            for tensors in initial.values():
                for name in tensors.trainable.keys() & {"A", "A1"}:
                    tensors.trainable[name].normal_(generator=Generator().manual_seed(2))
            return initial

    return NormalStart()


class LargestTriplets(MiLoRA):
    """The largest triplets, as by the fast path of the survey's code."""

    smallest = False


class OneSingularValue(NoRA):
    """The inner factors keep a single singular value."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        for tensor in initial.trainable.values():
            tensor.diagonal()[1:].zero_()
        return initial


class ScaleOfOneExpert(GOAT):
    """The scale of LoRA's whole update on each expert, so that GOAT differs from LoRAMoE by a factor of 8."""

    def scaling(self, settings: VariantSettings) -> float:
        return super().scaling(settings) / self.expert_count(settings)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        *((check_kaiming, kind(), normal_start(kind)) for kind in (MELoRA, LoRAMoE, MoLA, LoHa)),
        (check_smallest_triplets, MiLoRA(), LargestTriplets()),
        (check_rank, NoRA(), OneSingularValue()),
        (check_scale_of_experts, GOAT(), ScaleOfOneExpert()),
    ],
    ids=["melora", "lora_moe", "mola", "loha", "milora", "nora", "goat"],
)
def test_a_check_detects_the_defect(check: Callable[[Variant], None], right: Variant, wrong: Variant) -> None:
    check(right)
    with pytest.raises(AssertionError):
        check(wrong)
