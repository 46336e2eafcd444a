"""Lanes of rank 1 are independent of each other.

PyTorch alone would sum products with a single column in another order for one lane than for several.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import AuxiliaryLoss, Batching, UnsupportedError, VariantSettings
from variants.testing.rig import Case, attach_lanes, lane_inputs, model_output, perturb_lanes

CASE = Case("rank-one", out_features=64, in_features=48)
WITHOUT_RANK_ONE = ["adamole", "goat", "gralora", "head_only", "hra", "lora_moe", "pro_lora", "psoft", "rasa"]
"""A head alone, and variants that divide the rank."""


def gradients(adapters: Adapters, lanes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients of lane "1" after one backward pass of these lanes together."""
    for lane in lanes:
        for parameter in adapters.trainable(lane).values():
            parameter.grad = None
    with adapters.activate_lanes(lanes, 0) as context:
        loss = model_output(adapters.model, lane_inputs(CASE, lanes)).square().sum()
        auxiliary = context.auxiliary_loss()
        assert (auxiliary is not None) == isinstance(adapters.variant, AuxiliaryLoss)
        (loss if auxiliary is None else loss + auxiliary.sum()).backward()
    return {n: p.grad.clone() for n, p in adapters.trainable("1").items() if p.grad is not None}


@pytest.mark.parametrize("name", catalogue.names())
def test_lanes_of_rank_one_are_independent(name: str) -> None:
    if catalogue.get(name).batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} trains one lane at a time")
    try:
        adapters = attach_lanes(CASE, catalogue.get(name), 3, VariantSettings(1, 8.0))
    except UnsupportedError as refusal:
        if name not in WITHOUT_RANK_ONE:
            raise
        pytest.skip(str(refusal))
    perturb_lanes(CASE, adapters)
    alone, grouped = gradients(adapters, ("1",)), gradients(adapters, ("0", "1", "2"))
    assert alone
    assert alone.keys() == grouped.keys()
    assert all(torch.equal(gradient, grouped[key]) for key, gradient in alone.items())
