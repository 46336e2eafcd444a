"""OLoRA: the initialization from the QR decomposition, in float64."""

from __future__ import annotations

import pytest
import torch
from rule import check_update, initial_tensors

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings

RANK, ALPHA = 3, 12.0


def test_update_is_relative_to_the_initial_product() -> None:
    check_update(
        "olora",
        lambda params, weight, settings, s: s * (params["B"] @ params["A"] - params["B0"] @ params["A0"]),
        VariantSettings(RANK, ALPHA),
    )


@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_start_is_the_first_part_of_the_qr_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("olora")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    a, b = start.trainable["A"], start.trainable["B"]
    torch.testing.assert_close(b.t() @ b, torch.eye(RANK, dtype=torch.float64))
    # The first columns of W are products of the first columns of Q alone.
    torch.testing.assert_close(b @ a[:, :RANK], weight[:, :RANK])
    torch.testing.assert_close(a, b.t() @ weight)
    assert a[:, :RANK].tril(-1).abs().max() < 1e-12
    assert torch.equal(start.frozen["A0"], a)
    assert torch.equal(start.frozen["B0"], b)
