"""A lane's gradients among other lanes: on a GPU, and at rank 1.

On a GPU, a lane in a group equals the lane alone up to rounding, because the order of sums may differ. At
rank 1, PyTorch alone would sum products with a single column in another order for one lane than for several.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import AdaptationScope, AuxiliaryLoss, Batching, UnsupportedError, VariantSettings
from variants.testing.rig import (
    CASES,
    Case,
    attach_lanes,
    backward,
    lane_outputs,
    perturb_lanes,
    relative_error,
    tensors_equal,
)

SEVERAL = [case for case in CASES if case.lanes > 1]
ON_GPU = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, case in product(catalogue.names(), SEVERAL)
    if torch.cuda.is_available()
]
"""Empty without a GPU, so that there are not hundreds of skipped tests."""


def gradients(case: Case, adapters: Adapters, lanes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients of lane "1" after one backward pass of these lanes together."""
    for lane in lanes:
        for parameter in adapters.trainable(lane).values():
            parameter.grad = None
    auxiliary = backward(case, adapters, lanes, [0] * len(lanes))
    assert (auxiliary is not None) == isinstance(adapters.variant, AuxiliaryLoss)
    return {n: p.grad.clone() for n, p in adapters.trainable("1").items() if p.grad is not None}


def check_lanes_agree(name: str, case: Case) -> None:
    variant = catalogue.get(name)
    if variant.batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} trains one lane at a time")
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and case.model != "headed":
        pytest.skip("the model has no head")
    adapters = attach_lanes(case, variant, 3, VariantSettings(4, 8.0, dropout=0.1))
    perturb_lanes(case, adapters)
    alone = lane_outputs(case, adapters, ["1"])
    assert relative_error(lane_outputs(case, adapters).chunk(3)[1], alone) < case.tolerance
    expected, grouped = gradients(case, adapters, ("1",)), gradients(case, adapters, ("0", "1", "2"))
    assert expected.keys() == grouped.keys() == adapters.trainable("1").keys()
    for key, gradient in expected.items():
        assert relative_error(grouped[key], gradient) < case.tolerance, key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "case"), ON_GPU)
def test_lanes_agree_on_a_gpu(name: str, case: Case) -> None:
    check_lanes_agree(name, replace(case, device="cuda"))


def test_the_check_of_the_gpu_tests_holds_on_a_cpu() -> None:
    """A defect of the check is noticed without a GPU.

    The laws are stricter on a CPU, where a lane in a group equals the lane alone bit for bit.
    """
    check_lanes_agree("lora", next(case for case in SEVERAL if case.model == "headed"))


RANK_ONE = Case("rank-one", out_features=64, in_features=48)
WITHOUT_RANK_ONE = ["adamole", "goat", "gralora", "head_only", "hra", "lora_moe", "pro_lora", "psoft", "rasa"]
"""A head alone, and variants that divide the rank."""


@pytest.mark.parametrize("name", catalogue.names())
def test_lanes_of_rank_one_are_independent(name: str) -> None:
    if catalogue.get(name).batching is Batching.EXCLUSIVE:
        pytest.skip(f"{name} trains one lane at a time")
    try:
        adapters = attach_lanes(RANK_ONE, catalogue.get(name), 3, VariantSettings(1, 8.0))
    except UnsupportedError as refusal:
        if name not in WITHOUT_RANK_ONE:
            raise
        pytest.skip(str(refusal))
    check_equal_bits(adapters)


@pytest.mark.parametrize(("rank", "top_k"), [(2, 0), (2, 2), (16, 2)])
def test_lanes_with_experts_of_rank_one_or_few_gates_are_independent(rank: int, top_k: int) -> None:
    settings = VariantSettings(rank, 16.0, extra={"top_k": top_k})
    check_equal_bits(attach_lanes(RANK_ONE, catalogue.get("lora_moe"), 3, settings))


def check_equal_bits(adapters: Adapters) -> None:
    perturb_lanes(RANK_ONE, adapters)
    alone, grouped = (gradients(RANK_ONE, adapters, lanes) for lanes in (("1",), ("0", "1", "2")))
    assert alone
    assert tensors_equal(alone, grouped)
