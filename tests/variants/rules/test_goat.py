"""GOAT's experts, initialization and balancing loss, computed independently."""

from __future__ import annotations

import math

import pytest
import torch
from mixture_loop import mean_over_examples, mix, switch_loss, top_gates
from rule import check_output, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, Params, VariantSettings

VARIANT = catalogue.get("goat")
OUT, IN = 20, 24


def settings(rank: int = 8, **extra: float | str) -> VariantSettings:
    return VARIANT.validate_settings(VariantSettings(rank, 16.0, extra=extra))


def layer() -> FrozenLayer:
    noise = torch.Generator().manual_seed(1)
    return FrozenLayer("layer", torch.randn(OUT, IN, generator=noise, dtype=torch.float64), None)


def start(lane_settings: VariantSettings, frozen: FrozenLayer) -> InitialTensors:
    return initial_tensors(VARIANT, frozen, lane_settings)


def compute(x: Tensor, params: Params, frozen: FrozenLayer, lane_settings: VariantSettings) -> Tensor:
    """Return the layer's output (N, out) for x (N, in)."""
    scaling = torch.full((1, 1, 1), VARIANT.scaling(lane_settings), dtype=torch.float64)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    prepared = VARIANT.prepare(stacked, frozen.with_settings(lane_settings, scaling))
    base = (x @ frozen.weight.T).unsqueeze(0)
    return VARIANT.forward(x.unsqueeze(0), base, prepared, frozen.with_settings(lane_settings, scaling))[0]


@pytest.mark.parametrize("scaling", ["alpha", "theory"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_mean_of_the_initial_experts_is_taken_off(scaling: str, top_k: int) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, lane: VariantSettings, s: float) -> Tensor:
        scale = math.sqrt(3 * 2.0 * weight.shape[1] / 2) if scaling == "theory" else 16.0 / 2
        gates = top_gates(x, params["R"], top_k)
        even = torch.full_like(gates, 1 / 4)
        learned = mix(x, params["A"], params["B"], gates)
        return scale * (learned - mix(x, params["A0"], params["B0"], even))

    extra = {"experts": 4, "top_k": top_k, "scaling": scaling, "eta": 2.0}
    check_output("goat", update, settings=VariantSettings(8, 16.0, extra=extra))


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("scaling", ["alpha", "theory"])
def test_each_expert_starts_from_its_part_of_the_spectrum(rank: int, scaling: str) -> None:
    lane_settings, frozen = settings(rank, scaling=scaling), layer()
    initial = start(lane_settings, frozen)
    u, singular, vh = torch.linalg.svd(frozen.weight)
    size, spacing = rank // 8, OUT // 8
    scale = math.sqrt(3 * IN / size) if scaling == "theory" else 16.0 / size
    for expert in range(8):
        part = slice(expert * spacing, expert * spacing + size)
        ranks = slice(expert * size, expert * size + size)
        a, b = initial.trainable["A"][ranks], initial.trainable["B"][:, ranks]
        expected = u[:, part] @ torch.diag(singular[part]) @ vh[part] / 10
        torch.testing.assert_close(scale * b @ a, expected)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    assert torch.equal(initial.frozen["A0"], initial.trainable["A"])
    assert torch.equal(initial.frozen["B0"], initial.trainable["B"])


def test_even_gates_start_at_the_base_model() -> None:
    """The published study's code takes the initial experts off E times: without the factor 1 / E."""
    lane_settings, frozen = settings(top_k=0), layer()
    initial = start(lane_settings, frozen)
    params = {**initial.trainable, **initial.frozen}
    x = torch.randn(50, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base = x @ frozen.weight.T
    even = {**params, "R": torch.zeros_like(params["R"])}
    torch.testing.assert_close(compute(x, even, frozen, lane_settings), base)
    distance = (compute(x, params, frozen, settings()) - base).norm() / base.norm()
    assert 1e-3 < distance < 0.1


def test_equal_configurations_have_equal_scales() -> None:
    """The published study's code has s = 16 for GOAT and 2 for LoRAMoE, with gates that sum to 1 in both.

    Here both have 16, so that even gates give the scale alpha / rank = 2 of LoRA.
    """
    scales = set()
    for name in ("goat", "lora_moe", "adamole"):
        variant = catalogue.get(name)
        scales.add(variant.scaling(variant.validate_settings(VariantSettings(8, 16.0))))
    assert scales == {16.0}
    lora = catalogue.get("lora")
    assert lora.scaling(lora.validate_settings(VariantSettings(8, 16.0))) == 16.0 / 8


def test_the_balancing_loss_is_the_official_one_for_each_example() -> None:
    noise, lane_settings, frozen = torch.Generator().manual_seed(0), settings(), layer()
    params = {name: tensor.unsqueeze(0) for name, tensor in start(lane_settings, frozen).trainable.items()}
    x = torch.randn(1, 3, 6, IN, generator=noise, dtype=torch.float64)
    mask = torch.ones(1, 3, 6, dtype=torch.float64)
    mask[0, 1, 4:] = 0

    def loss(tokens: Tensor) -> Tensor:
        router = params["R"][0]
        return switch_loss(torch.softmax(tokens @ router.T, -1), top_gates(tokens, router, 2) > 0)

    found = VARIANT.auxiliary_loss(x, mask, params, frozen.with_settings(lane_settings))
    torch.testing.assert_close(found[0], 1e-3 * mean_over_examples(loss, x[0], mask[0]))
