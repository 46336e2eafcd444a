"""Update rules of the variants with several experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rule import check_output, initial_tensors, start_of
from torch import Tensor

from variants import catalogue
from variants.adapters import init_layers
from variants.api import FrozenLayer, InitialTensors, Params, VariantSettings
from variants.mixture import keep_largest

# The mixtures, computed one token and one expert at a time, as the official codes define them.


def mix(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """Return sum_i gates_i B_i A_i x for x (N, in); a and b hold the experts' factors one after the other."""
    experts = gates.shape[1]
    rank, total = len(a) // experts, torch.zeros(len(x), len(b), dtype=x.dtype)
    for expert in range(experts):
        ranks = slice(expert * rank, (expert + 1) * rank)
        total = total + gates[:, expert, None] * (x @ a[ranks].T @ b[:, ranks].T)
    return total


def top_gates(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Return the gates (N, experts) of a router that keeps the largest logits."""
    logits = x @ router.T
    kept = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(-1))


def switch_loss(probabilities: Tensor, served: Tensor) -> Tensor:
    """Return experts * sum_i f_i P_i for one example, from (tokens, experts) each."""
    experts = probabilities.shape[1]
    terms = [served[:, i].double().mean() * probabilities[:, i].mean() for i in range(experts)]
    return experts * torch.stack(terms).sum()


def check_balancing_loss(
    name: str,
    loss: Callable[[Tensor, Params], Tensor],
    weight: float = 1e-3,
    layer: str = "layer",
    **extra: float | str,
) -> None:
    """Check that a variant's balancing loss of three padded examples is the mean of their own losses.

    Args:
        name: The variant.
        loss: Returns the loss of one example from its tokens (L, in), without padding, and the tensors.
        weight: The factor of the mean.
        layer: The name of the layer.
        extra: Values of the variant's own hyperparameters.
    """
    variant, noise = catalogue.get(name), torch.Generator().manual_seed(0)
    given = variant.validate_settings(VariantSettings(8, 16.0, extra=extra))
    frozen = FrozenLayer(layer, torch.randn(20, 24, generator=noise, dtype=torch.float64), None)
    params = dict(initial_tensors(variant, frozen, given).trainable)
    params["R"] = params["R"] * 10
    x, mask = (
        torch.randn(3, 6, 24, generator=noise, dtype=torch.float64),
        torch.ones(3, 6, dtype=torch.float64),
    )
    mask[1, 4:] = mask[2, 3:] = 0
    stacked = {key: tensor.unsqueeze(0) for key, tensor in params.items()}
    found = variant.auxiliary_loss(x.unsqueeze(0), mask.unsqueeze(0), stacked, frozen.with_settings(given))
    each = [loss(row[keep.bool()], params) for row, keep in zip(x, mask, strict=True)]
    assert min(each) > 0
    torch.testing.assert_close(found[0], weight * torch.stack(each).mean())


# AdaMoLE's thresholds and balancing loss, computed independently.


ADAMOLE_VARIANT = catalogue.get("adamole")


def margins(x: Tensor, params: Params, largest: float) -> Tensor:
    """Return by how much each expert's probability exceeds its token's threshold, (N, experts)."""
    threshold = largest * torch.sigmoid(x @ params["T"].T + params["c"])
    return torch.softmax(x @ params["R"].T, dim=-1) - threshold


@pytest.mark.parametrize("largest", [0.0, 0.4])
def test_adamole_experts_above_the_threshold_serve_a_token(largest: float) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        above = margins(x, params, largest or 1 / 4)
        weights = above * (above >= 0)
        total = weights.sum(-1, keepdim=True)
        return s * mix(x, params["A"], params["B"], weights / torch.where(total == 0, 1.0, total))

    extra = {"experts": 4, "max_threshold": largest}
    check_output("adamole", update, settings=VariantSettings(8, 16.0, extra=extra))


def test_adamole_the_balancing_loss_is_the_official_one_for_each_example() -> None:
    def loss(tokens: Tensor, params: Params) -> Tensor:
        above = margins(tokens, params, 1 / 8)
        return switch_loss(above, above >= 0)

    check_balancing_loss("adamole", loss)


def test_adamole_the_router_and_the_threshold_start_as_linear_layers() -> None:
    """All values are from U(-1/sqrt(in), 1/sqrt(in)); each seed draws only one value of c."""
    settings = VariantSettings(8, 16.0)
    starts = [start_of("adamole", torch.zeros(20, 200), settings, seed).trainable for seed in range(40)]
    for name, shape in {"R": (8, 200), "T": (1, 200), "c": (1,)}.items():
        drawn = torch.stack([start[name] for start in starts]) * 200**0.5
        assert drawn.shape == (40, *shape)
        assert -1 <= drawn.min() < -0.8
        assert 0.8 < drawn.max() <= 1


def test_adamole_a_token_has_at_least_one_expert_and_not_always_the_same_number() -> None:
    noise = torch.Generator().manual_seed(1)
    layer = FrozenLayer("layer", torch.zeros(20, 12, dtype=torch.float64), None)
    settings = ADAMOLE_VARIANT.validate_settings(VariantSettings(8, 16.0))
    params = dict(initial_tensors(ADAMOLE_VARIANT, layer, settings).trainable)
    stacked = {name: tensor.unsqueeze(0) * 10 for name, tensor in params.items()}
    x = torch.randn(1, 200, 12, generator=noise, dtype=torch.float64)
    gates, _ = ADAMOLE_VARIANT.route(x, stacked, settings)
    served = (gates > 0).sum(2)
    assert served.min() >= 1
    assert len(served.unique()) > 1
    torch.testing.assert_close(gates.sum(2), torch.ones(1, 200, dtype=torch.float64))


# GOAT's experts, initialization and balancing loss, computed independently.


GOAT_VARIANT = catalogue.get("goat")
OUT, IN = 20, 24


def settings(rank: int = 8, **extra: float | str) -> VariantSettings:
    return GOAT_VARIANT.validate_settings(VariantSettings(rank, 16.0, extra=extra))


def layer() -> FrozenLayer:
    noise = torch.Generator().manual_seed(1)
    return FrozenLayer("layer", torch.randn(OUT, IN, generator=noise, dtype=torch.float64), None)


def start(lane_settings: VariantSettings, frozen: FrozenLayer) -> InitialTensors:
    return initial_tensors(GOAT_VARIANT, frozen, lane_settings)


def compute(x: Tensor, params: Params, frozen: FrozenLayer, lane_settings: VariantSettings) -> Tensor:
    """Return the layer's output (N, out) for x (N, in)."""
    scaling = torch.full((1, 1, 1), GOAT_VARIANT.scaling(lane_settings), dtype=torch.float64)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    prepared = GOAT_VARIANT.prepare(stacked, frozen.with_settings(lane_settings, scaling))
    base = (x @ frozen.weight.T).unsqueeze(0)
    return GOAT_VARIANT.forward(x.unsqueeze(0), base, prepared, frozen.with_settings(lane_settings, scaling))[
        0
    ]


@pytest.mark.parametrize("scaling", ["alpha", "theory"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_goat_the_mean_of_the_initial_experts_is_taken_off(scaling: str, top_k: int) -> None:
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
def test_goat_each_expert_starts_from_its_part_of_the_spectrum(rank: int, scaling: str) -> None:
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


def test_goat_even_gates_start_at_the_base_model() -> None:
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


def test_goat_equal_configurations_have_equal_scales() -> None:
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


def test_goat_the_balancing_loss_is_the_official_one_for_each_example() -> None:
    def loss(tokens: Tensor, params: Params) -> Tensor:
        gates = top_gates(tokens, params["R"], 2)
        return switch_loss(torch.softmax(tokens @ params["R"].T, -1), gates > 0)

    check_balancing_loss("goat", loss)


# HydraLoRA's output, computed with a loop over its B matrices as in the official code.


@pytest.mark.parametrize("experts", [2, 3])
def test_hydra_lora_the_router_weighs_the_b_matrices(experts: int) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        gates, shared = torch.softmax(x @ params["R"].T, dim=-1), x @ params["A"].T
        total = torch.zeros(len(x), len(weight), dtype=x.dtype)
        for expert in range(experts):
            b = params["B"][:, expert * 4 : expert * 4 + 4]
            total = total + gates[:, expert, None] * (shared @ b.T)
        return s * total

    check_output("hydra_lora", update, settings=VariantSettings(4, 8.0, extra={"experts": experts}))


def test_hydra_lora_every_b_matrix_has_the_whole_rank() -> None:
    initial = start_of("hydra_lora", torch.zeros(20, 30), VariantSettings(7, 14.0)).trainable
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    assert shapes == {"A": (7, 30), "B": (20, 21), "R": (3, 30)}
    assert catalogue.get("hydra_lora").scaling(VariantSettings(7, 14.0)) == 2.0
    assert not initial["B"].any()
    assert 0.9 * 30**-0.5 < initial["R"].abs().max() < 30**-0.5


# LoRAMoE's experts, their number, and the loss of their loads.


@pytest.mark.parametrize("rank", [4, 8, 16, 12])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_lora_moe_the_gates_weigh_the_experts(rank: int, top_k: int) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        gates = top_gates(x, params["R"], top_k) if top_k else torch.softmax(x @ params["R"].T, dim=-1)
        return 16.0 * gates.shape[1] / rank * mix(x, params["A"], params["B"], gates)

    check_output("lora_moe", update, settings=VariantSettings(rank, 16.0, extra={"top_k": top_k}))


def test_lora_moe_all_gates_that_tie_for_the_last_place_are_kept() -> None:
    gates = torch.tensor([[[0.4, 0.2, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2]]])
    expected = torch.tensor([[[0.4, 0.2, 0.2, 0.2], [0.0, 4 / 7, 3 / 7, 0.0]]])
    torch.testing.assert_close(keep_largest(gates, 2), expected)


@pytest.mark.parametrize(("rank", "experts"), [(2, 2), (4, 4), (7, 7), (8, 8), (9, 3), (12, 6), (16, 8)])
def test_lora_moe_the_number_of_experts_divides_the_rank(rank: int, experts: int) -> None:
    initial = start_of("lora_moe", torch.zeros(20, 12), VariantSettings(rank, 16.0)).trainable
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    assert shapes == {"A": (rank, 12), "B": (20, rank), "R": (experts, 12)}


@pytest.mark.parametrize(("extra", "weight"), [({}, 0.1), ({"balance": 0.5}, 0.5)])
def test_lora_moe_the_balancing_loss_is_the_squared_variation_of_the_loads(
    extra: dict[str, float], weight: float
) -> None:
    def loss(tokens: Tensor, params: Params) -> Tensor:
        loads = torch.softmax(tokens @ params["R"].T, -1).sum(0)
        return loads.var() / loads.mean() ** 2

    check_balancing_loss("lora_moe", loss, weight, **extra)


# MoLA's experts by depth, outputs and balancing loss, computed independently.


MOLA_VARIANT = catalogue.get("mola")


def test_mola_the_two_largest_gates_weigh_experts_of_the_full_rank() -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        assert len(params["A"]) == 4 * len(params["R"])
        return 2.0 * mix(x, params["A"], params["B"], top_gates(x, params["R"], 2))

    check_output("mola", update, settings=VariantSettings(4, 8.0))


@pytest.mark.parametrize(
    ("shape", "blocks", "expected"),
    [
        ("inverted_triangle", 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ("triangle", 8, [8, 8, 6, 6, 4, 4, 2, 2]),
        ("hourglass", 4, [8, 2, 2, 8]),
        ("rectangle", 2, [5, 5]),
        ("inverted_triangle", 6, [2, 2, 4, 6, 6, 8]),
        ("inverted_triangle", 1, [2]),
    ],
)
def test_mola_the_number_of_experts_depends_on_the_block(
    shape: str, blocks: int, expected: list[int]
) -> None:
    settings = MOLA_VARIANT.validate_settings(VariantSettings(3, 6.0, extra={"shape": shape}))
    names = [f"model.layers.{block}.q_proj" for block in range(blocks)]
    weight = torch.zeros(20, 12)
    layers = {name: FrozenLayer(name, weight, None, settings=settings) for name in [*names, "pooler"]}
    initial = init_layers(MOLA_VARIANT, layers, seed=0)
    assert [len(initial[name].trainable["R"]) for name in names] == expected
    assert len(initial["pooler"].trainable["R"]) == expected[-1]
    for tensors in initial.values():
        experts = len(tensors.trainable["R"])
        assert tensors.trainable["A"].shape == (3 * experts, 12)
        assert tensors.trainable["B"].shape == (20, 3 * experts)


def test_mola_the_balancing_loss_is_the_official_one_of_one_layer_for_each_example() -> None:
    def loss(tokens: Tensor, params: Params) -> Tensor:
        probabilities = torch.softmax(tokens @ params["R"].T, -1)
        chosen = torch.bincount(probabilities.topk(2, -1).indices.flatten(), minlength=5)
        return 5 * (chosen / chosen.sum() * probabilities.mean(0)).sum()

    check_balancing_loss("mola", loss, layer="layers.0.q_proj", shape="rectangle")
