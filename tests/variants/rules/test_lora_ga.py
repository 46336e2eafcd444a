"""LoRA-GA: the update in float64, and the initialization from the gradient's singular vectors."""

from __future__ import annotations

import pytest
import torch
from rule import check_update

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings


def test_update_is_relative_to_the_initial_product_with_s_alpha_over_the_root_of_the_rank() -> None:
    check_update(
        "lora_ga",
        lambda params, weight, settings, s: 8 / 2 * (params["B"] @ params["A"] - params["B0"] @ params["A0"]),
        VariantSettings(4, 8.0),
    )


@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_start_has_the_singular_vectors_of_a_slowly_decaying_gradient(gamma: float) -> None:
    """The authors' SVD with 4 r columns reaches 0.9998 for B; one with 2 r + 10 columns reaches 0.88."""
    rank, out_features, in_features = 32, 512, 768
    noise = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(out_features, out_features, generator=noise))[0]
    v = torch.linalg.qr(torch.randn(in_features, out_features, generator=noise))[0]
    gradient = u * torch.arange(1.0, out_features + 1) ** -0.5 @ v.T
    variant = catalogue.get("lora_ga")
    settings = variant.validate_settings(VariantSettings(rank, 8.0, extra={"gamma": gamma}))
    layer = FrozenLayer("layer", torch.zeros(out_features, in_features), None)
    found = variant.reduce_calibration(layer.with_settings(settings), gradient)
    c = out_features**0.25 / gamma**0.5
    for name, exact, columns in (
        ("A0", v[:, :rank], found["A0"].T),
        ("B0", u[:, rank : 2 * rank], found["B0"]),
    ):
        torch.testing.assert_close(columns.norm(dim=0), torch.full((rank,), c))
        cosines = torch.nn.functional.cosine_similarity(columns, exact, dim=0).abs()
        assert cosines.mean() > 0.999, name
