"""DuDe: DoRA's rule over PiSSA's factors, computed in float64."""

from __future__ import annotations

import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings

RANK, ALPHA = 3, 12.0


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    direction = weight + s * (params["B"] @ params["A"] - params["B0"] @ params["A0"])
    norms = direction.norm(dim=1).detach()
    return (params["m"] / norms).unsqueeze(1) * direction - weight


def test_update_normalizes_the_weight_with_the_residual() -> None:
    check_update("dude", change, VariantSettings(RANK, ALPHA))


def test_start_is_that_of_pissa_with_the_norms_of_the_weight() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("dude")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    product = start.trainable["B"] @ start.trainable["A"]
    torch.testing.assert_close(ALPHA / RANK * product, (u[:, :RANK] * s[:RANK]) @ vh[:RANK])
    torch.testing.assert_close(start.trainable["m"], weight.norm(dim=1))
    assert torch.equal(start.frozen["A0"], start.trainable["A"])
