"""Rank 1: a single column would take another path through the matmul for one lane than for several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from variants import catalogue
from variants.attach import Adapters
from variants.base import Batching, UnsupportedError
from variants.testing.cases import Case
from variants.testing.rig import NotApplicableError, attach_lanes, lane_inputs, model_output, perturb_lanes

CASE = Case("rank-one", out_features=64, in_features=48)


def gradients(adapters: Adapters, lanes: tuple[str, ...]) -> dict[str, Tensor]:
    """Of lane "1", after one backward of these lanes together."""
    for lane in lanes:
        for parameter in adapters.trainable(lane).values():
            parameter.grad = None
    with adapters.activate_lanes(lanes, None) as now:
        loss, extra = (
            model_output(adapters.model, lane_inputs(CASE, lanes)).square().sum(),
            now.auxiliary_loss(),
        )
        (loss if extra is None else loss + extra.sum()).backward()
    return {n: p.grad.clone() for n, p in adapters.trainable("1").items() if p.grad is not None}


@pytest.mark.parametrize("name", catalogue.names())
def test_rank_one_lanes_do_not_notice_each_other(name: str) -> None:
    if catalogue.get(name).batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} is alone in its pack")
    try:
        adapters = attach_lanes(CASE, catalogue.get(name), 3, rank=1)
    except NotApplicableError as reason:
        pytest.skip(str(reason))
    except UnsupportedError as refusal:
        assert name == "lora_moe", "only a mixture of experts has no rank 1"
        pytest.skip(str(refusal))
    perturb_lanes(CASE, adapters)
    alone, company = gradients(adapters, ("1",)), gradients(adapters, ("0", "1", "2"))
    assert alone
    assert alone.keys() == company.keys()
    assert all(torch.equal(gradient, company[key]) for key, gradient in alone.items())
