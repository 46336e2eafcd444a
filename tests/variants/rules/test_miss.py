"""MiSS's rule and initialization."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from rule import adapt, check_update
from torch import Tensor

from variants.api import VariantSettings


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    rank = len(params["D"])
    return torch.stack([params["D"][column % rank] for column in range(weight.shape[1])], dim=1)


@pytest.mark.parametrize("rank", [4, 7])  # 7 divides neither 24 nor 40
def test_one_matrix_is_repeated_along_the_inputs(rank: int) -> None:
    check_update("miss", change, VariantSettings(rank, alpha=3.0))


def test_the_matrix_begins_at_zero() -> None:
    tensors = adapt("miss", VariantSettings(3), perturb=False).trainable("0")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 40), (3, 24)}
    assert not any(tensor.any() for tensor in tensors.values())
