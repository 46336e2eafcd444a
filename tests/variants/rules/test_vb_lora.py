"""VB-LoRA's rule and initialization."""

from __future__ import annotations

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, UnsupportedError, VariantSettings
from variants.attach import attach
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes


def mixture(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the sum of the k chosen vectors, weighted by the softmax over their logits alone."""
    chosen = sorted(range(len(logits)), key=lambda i: -float(logits[i].detach()))[:k]
    weights = torch.stack([logits[i].exp() for i in chosen])
    return sum(w * bank[i] for w, i in zip(weights / weights.sum(), chosen, strict=True))  # type: ignore[return-value]


def mixed_factors(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    bank, k = params["bank"], int(settings["top_k"])
    a = torch.stack([torch.cat([mixture(piece, bank, k) for piece in rank]) for rank in params["PA"]])
    b = torch.cat([torch.stack([mixture(rank, bank, k) for rank in piece]).T for piece in params["PB"]])
    assert (len(b), a.shape[1]) == weight.shape
    return b @ a


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_update_is_a_product_of_mixed_factors(top_k: int) -> None:
    extra = {"vectors": 5, "vector_length": 4, "top_k": top_k}
    check_update("vb_lora", mixed_factors, settings=VariantSettings(3, extra=extra))


def test_initial_values_and_shapes() -> None:
    settings = VariantSettings(4, extra={"vector_length": 16})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("vb_lora"), 1, settings)
    tensors = adapters.trainable("0")
    assert tensors["group:vb_lora.bank"].shape == (256, 16)
    assert 0.0199 < tensors["group:vb_lora.bank"].abs().max() <= 0.02
    a, b = (tensors[f"model.layers.0.mlp.down_proj.P{name}"] for name in "AB")
    assert a.shape == (4, 3, 256)
    assert b.shape == (2, 4, 256)
    for logits in (a, b):
        torch.testing.assert_close(logits.std(), torch.tensor(0.1), rtol=0.05, atol=0)
        assert logits.mean().abs() < 0.01


def test_the_logits_learn_ten_times_as_fast_as_the_bank() -> None:
    settings = VariantSettings(4, extra={"vector_length": 8})
    case = Case("square")
    adapters = attach_lanes(case, catalogue.get("vb_lora"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 1e-3, 1)
    before = {name: p.detach().clone() for name, p in adapters.trainable("0").items()}
    with adapters.activate_lanes(["0"], 0):
        adapters.model(case.rows(0)).square().sum().backward()
    optimizer.step()
    steps = {n: (p.detach() - before[n]).abs().max().item() for n, p in adapters.trainable("0").items()}
    assert steps["group:vb_lora.bank"] == pytest.approx(1e-3, rel=0.01)
    assert steps["there.0.PA"] == pytest.approx(1e-2, rel=0.02)


def test_sizes_that_the_vectors_do_not_divide_are_refused_at_attach() -> None:
    settings = VariantSettings(2, extra={"vector_length": 16})
    with pytest.raises(UnsupportedError, match="vector_length 16 does not divide 40 x 32"):
        attach(Case("tall", out_features=40, in_features=32).build(), catalogue.get("vb_lora"), settings)


@pytest.mark.parametrize(
    ("case", "length"),
    [
        (Case("large", out_features=512, in_features=256), 256),
        (Case("tall", out_features=96, in_features=32), 32),
        (Case("llama", model="llama"), 16),
    ],
    ids=["256", "32", "16"],
)
def test_the_default_length_is_the_largest_divisor_of_256_that_divides_all_sides(
    case: Case, length: int
) -> None:
    adapters = attach_lanes(case, catalogue.get("vb_lora"), 1)
    assert adapters.trainable("0")["group:vb_lora.bank"].shape == (256, length)
    assert adapters.lane_settings("0")["vector_length"] == length


def test_more_vectors_in_a_mixture_than_in_the_bank_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="top_k 3: must be at most vectors 2"):
        catalogue.get("vb_lora").validate_settings(VariantSettings(extra={"vectors": 2, "top_k": 3}))
