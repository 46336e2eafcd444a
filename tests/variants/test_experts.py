"""LoRAMoE: experts as one matrix product, the router, and the balancing loss."""

from __future__ import annotations

import pytest
import torch
from rule import initial_tensors
from torch import Tensor

from variants import catalogue
from variants.__main__ import count_parameters
from variants.api import ExtraSettings, FrozenLayer, UnsupportedError, VariantSettings
from variants.mixture import keep_largest

VARIANT = catalogue.get("lora_moe")
OUT, IN = 20, 12


def settings(rank: int = 8, **extra: float | int) -> VariantSettings:
    return VARIANT.validate_settings(VariantSettings(rank, 16.0, extra=extra))


def layer() -> FrozenLayer:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    return FrozenLayer("layer", weight, None)


def stacked_tensors(lane_settings: VariantSettings, count: int = 2, seed: int = 2) -> dict[str, Tensor]:
    """Return tensors (K, ...) of K lanes with a non-zero B and a router whose gates differ."""
    noise = torch.Generator().manual_seed(seed)
    initial = [initial_tensors(VARIANT, layer(), lane_settings, seed=lane) for lane in range(count)]
    by_lane = [{**tensors.trainable, **tensors.frozen} for tensors in initial]
    stacked = {name: torch.stack([tensors[name] for tensors in by_lane]) for name in by_lane[0]}
    stacked["B"] = torch.randn(stacked["B"].shape, generator=noise)
    stacked["R"] = stacked["R"] * 8
    return stacked


def inputs(count: int = 2) -> Tensor:
    return torch.randn(count, 7, IN, generator=torch.Generator().manual_seed(4))


def compute(x: Tensor, params: dict[str, Tensor], lane_settings: VariantSettings) -> Tensor:
    scaling = torch.full((len(x), 1, 1), VARIANT.scaling(lane_settings))
    prepared = VARIANT.prepare(params, layer().with_settings(lane_settings, scaling))
    return VARIANT.forward(x, x @ layer().weight.T, prepared, layer().with_settings(lane_settings, scaling))


def compute_with_loop(
    x: Tensor, params: dict[str, Tensor], lane: int, lane_settings: VariantSettings
) -> Tensor:
    """Compute one expert after the other, as in the authors' code.

    If `top_k` is set, only the kept gates count.
    """
    experts, top_k = params["R"].shape[1], int(lane_settings.extra["top_k"])
    expert_rank = lane_settings.rank // experts
    logits = x[lane] @ params["R"][lane].T
    gates = logits.softmax(-1)
    if top_k:
        kept = logits.topk(top_k, dim=-1)
        gates = torch.zeros_like(gates).scatter(-1, kept.indices, kept.values.softmax(-1))
    y = x[lane] @ layer().weight.T
    for expert in range(experts):
        ranks = slice(expert * expert_rank, (expert + 1) * expert_rank)
        a, b = params["A"][lane, ranks], params["B"][lane, :, ranks]
        y = y + gates[:, expert, None] * (x[lane] @ a.T @ b.T) * 16.0 / expert_rank
    return y


@pytest.mark.parametrize("rank", [4, 8, 16, 12])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_one_matrix_product_equals_the_loop_over_experts(rank: int, top_k: int) -> None:
    lane_settings = settings(rank, top_k=top_k)
    x, params = inputs(), stacked_tensors(lane_settings)
    together = compute(x, params, lane_settings)
    for lane in range(2):
        torch.testing.assert_close(
            together[lane], compute_with_loop(x, params, lane, lane_settings), rtol=1e-4, atol=1e-4
        )


def test_all_gates_that_tie_for_the_last_place_are_kept() -> None:
    gates = torch.tensor([[[0.4, 0.2, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2]]])
    expected = torch.tensor([[[0.4, 0.2, 0.2, 0.2], [0.0, 4 / 7, 3 / 7, 0.0]]])
    torch.testing.assert_close(keep_largest(gates, 2), expected)


@pytest.mark.parametrize(("rank", "experts"), [(2, 2), (4, 4), (7, 7), (8, 8), (9, 3), (12, 6), (16, 8)])
def test_the_number_of_experts_divides_the_rank(rank: int, experts: int) -> None:
    lane_settings = settings(rank)
    params = stacked_tensors(lane_settings)
    assert params["R"].shape == (2, experts, IN)
    assert params["A"].shape == (2, rank, IN)
    assert VARIANT.scaling(lane_settings) == pytest.approx(16 * experts / rank)
    assert count_parameters(VARIANT, lane_settings, {"x": (OUT, IN)}) == rank * (OUT + IN) + experts * IN


@pytest.mark.parametrize(
    ("rank", "extra", "message"),
    [
        (1, {}, "rank 1: no number of experts from 2 to 8 divides it"),
        (11, {}, "rank 11: no number of experts from 2 to 8 divides it"),
        (4, {"top_k": 5}, "top_k 5: there are 4 experts"),
    ],
)
def test_invalid_settings_are_refused(rank: int, extra: ExtraSettings, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        VARIANT.validate_settings(VariantSettings(rank, 16.0, extra=extra))


def balance(
    x: Tensor, params: dict[str, Tensor], attention_mask: Tensor | None = None, **extra: float
) -> Tensor:
    """Return the balancing loss of one example per lane, for inputs `x` (K, L, in)."""
    attention_mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
    lane_settings = settings(8, **extra)
    return VARIANT.auxiliary_loss(
        x.unsqueeze(1), attention_mask.unsqueeze(1), params, layer().with_settings(lane_settings)
    )


def test_the_balancing_loss_is_the_squared_variation_of_the_loads() -> None:
    x, params = inputs(), stacked_tensors(settings(8))
    for lane, term in enumerate(balance(x, params)):  # with the default weight
        load = (x[lane] @ params["R"][lane].T).softmax(-1).sum(0)
        torch.testing.assert_close(term, 0.1 * load.var() / load.mean() ** 2)
        assert term > 0
    even = {**params, "R": torch.zeros_like(params["R"])}
    torch.testing.assert_close(balance(x, even), torch.zeros(2))
    torch.testing.assert_close(balance(x, params, balance=0.5), 5 * balance(x, params))


def test_the_balancing_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    x, params = torch.randn(2, 6, 7, inputs().shape[-1]), stacked_tensors(settings(8))
    attention_mask = (torch.rand(2, 6, 7) > 0.3).float()
    whole = VARIANT.auxiliary_loss(x, attention_mask, params, layer().with_settings(settings(8)))
    parts = [
        VARIANT.auxiliary_loss(
            x[:, i : i + 2], attention_mask[:, i : i + 2], params, layer().with_settings(settings(8))
        )
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)


def test_the_balancing_loss_ignores_padding_and_length() -> None:
    x, params = inputs(), stacked_tensors(settings(8))
    attention_mask = torch.ones(2, 7)
    attention_mask[0, 3:] = 0
    attention_mask[1, 5:] = 0
    found = balance(x, params, attention_mask)
    torch.testing.assert_close(found[0], balance(x[:1, :3], select_lane(params, 0))[0])
    torch.testing.assert_close(found[1], balance(x[1:, :5], select_lane(params, 1))[0])
    assert torch.equal(
        found, balance(torch.where(attention_mask.unsqueeze(2) > 0, x, 100.0), params, attention_mask)
    )
    torch.testing.assert_close(balance(torch.cat([x, x], 1), params), balance(x, params))


def select_lane(params: dict[str, Tensor], lane: int) -> dict[str, Tensor]:
    return {name: tensor[lane : lane + 1] for name, tensor in params.items()}
