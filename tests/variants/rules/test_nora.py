"""NoRA: update and initialization, computed in float64."""

from __future__ import annotations

import pytest
import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings

RANK, ALPHA, OUTER = 3, 6.0, 4


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    update = params["B"] @ params["inner_B"] @ params["inner_A"] @ params["A"]
    s = ALPHA / (OUTER * RANK)  # the rank of the frozen factors, as in both codes
    return s * (update - params["B0"] @ params["A0"])


def test_update_is_relative_to_the_initial_product() -> None:
    check_update("nora", change, VariantSettings(RANK, ALPHA))


@pytest.mark.parametrize("outer", [1, 2, 40])
def test_start_has_the_largest_triplets_at_the_full_rank(outer: int) -> None:
    """The published study's code starts from one triplet, the second, whatever the rank is."""
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("nora")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA, extra={"outer": outer}))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    a, b = start.frozen["A"], start.frozen["B"]
    assert len(a) == min(outer * RANK, 14)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(b @ s[: len(a)].diag() @ a, (u[:, : len(a)] * s[: len(a)]) @ vh[: len(a)])
    update = b @ start.trainable["inner_B"] @ start.trainable["inner_A"] @ a
    torch.testing.assert_close(update, (u[:, :RANK] * s[:RANK]) @ vh[:RANK])
    assert torch.linalg.matrix_rank(update) == RANK
    torch.testing.assert_close(start.frozen["B0"] @ start.frozen["A0"], update)
    assert start.trainable.keys() == {"inner_A", "inner_B"}
