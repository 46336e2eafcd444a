"""HydraLoRA's output, computed with a loop over its B matrices as in the official code."""

from __future__ import annotations

import pytest
import torch
from rule import check_output, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings


@pytest.mark.parametrize("experts", [2, 3])
def test_the_router_weighs_the_b_matrices(experts: int) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        gates, shared = torch.softmax(x @ params["R"].T, dim=-1), x @ params["A"].T
        total = torch.zeros(len(x), len(weight), dtype=x.dtype)
        for expert in range(experts):
            b = params["B"][:, expert * 4 : expert * 4 + 4]
            total = total + gates[:, expert, None] * (shared @ b.T)
        return s * total

    check_output("hydra_lora", update, settings=VariantSettings(4, 8.0, extra={"experts": experts}))


def test_every_b_matrix_has_the_whole_rank() -> None:
    variant, layer = catalogue.get("hydra_lora"), FrozenLayer("layer", torch.zeros(20, 30), None)
    settings = variant.validate_settings(VariantSettings(7, 14.0))
    initial = initial_tensors(variant, layer, settings).trainable
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    assert shapes == {"A": (7, 30), "B": (20, 21), "R": (3, 30)}
    assert variant.scaling(settings) == 2.0
    assert not initial["B"].any()
    assert 0.9 * 30**-0.5 < initial["R"].abs().max() < 30**-0.5
