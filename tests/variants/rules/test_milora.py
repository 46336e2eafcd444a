"""MiLoRA: the initialization from the smallest singular triplets, in float64."""

from __future__ import annotations

import pytest
import torch
from rule import check_update, initial_tensors

from variants import catalogue
from variants.api import FrozenLayer, UnsupportedError, VariantSettings

RANK, ALPHA = 3, 12.0


def test_update_is_relative_to_the_initial_product() -> None:
    check_update(
        "milora",
        lambda params, weight, settings, s: s * (params["B"] @ params["A"] - params["B0"] @ params["A0"]),
        VariantSettings(RANK, ALPHA),
    )


@pytest.mark.parametrize("shape", [(16, 16), (20, 14), (14, 20)])
def test_start_has_the_smallest_triplets(shape: tuple[int, int]) -> None:
    """The published study's code takes the largest, with U and V exchanged, if its SVD is randomized."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("milora")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    a, b = start.trainable["A"], start.trainable["B"]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    scale = ALPHA / RANK
    smallest = (u[:, -RANK:] * s[-RANK:]) @ vh[-RANK:]
    torch.testing.assert_close(scale * b @ a, smallest)
    torch.testing.assert_close(a.norm(dim=1), (s[-RANK:] / scale).sqrt())
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
    # What stays frozen is the best approximation of W of its rank.
    assert torch.linalg.matrix_norm(weight - scale * b @ a, 2).item() == pytest.approx(s[0].item())
    assert torch.equal(start.frozen["A0"], a)
    assert torch.equal(start.frozen["B0"], b)


def test_a_randomized_svd_is_refused() -> None:
    variant = catalogue.get("milora")
    with pytest.raises(UnsupportedError, match="svd"):
        variant.validate_settings(VariantSettings(RANK, ALPHA, extra={"svd": "16"}))
