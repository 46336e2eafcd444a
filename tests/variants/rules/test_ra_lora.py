"""RaLoRA: diagonal blocks, whose number follows the effective rank of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, VariantSettings

RALORA = catalogue.get("ra_lora")
SETTINGS = RALORA.validate_settings(VariantSettings(4, 8.0))


def make_gradient(shape: tuple[int, int], rank: int) -> Tensor:
    """Return a matrix with `rank` equal singular values and a tiny one, so that its effective rank is `rank`.

    The tiny one keeps the effective rank from being rounded to below `rank`.
    """
    noise = torch.Generator().manual_seed(rank)
    left, right = (
        torch.linalg.qr(torch.randn(side, rank + 1, generator=noise, dtype=torch.float64)).Q for side in shape
    )
    return left @ torch.tensor([3.0] * rank + [0.001], dtype=torch.float64).diag() @ right.T


def init(shape: tuple[int, int], effective_rank: int, settings: VariantSettings) -> InitialTensors:
    weight = torch.zeros(shape, dtype=torch.float64)
    gradient = make_gradient(shape, effective_rank)
    calibration = RALORA.reduce_calibration(
        FrozenLayer("layer", weight, None).with_settings(settings), gradient
    )
    assert calibration["effective_rank"].item() == pytest.approx(effective_rank, rel=0.01)
    layer = FrozenLayer("layer", weight, None, calibration=calibration)
    return initial_tensors(RALORA, layer, settings)


def test_the_update_is_block_diagonal() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        blocks = int(p["blocks"])
        parts = zip(p["B"].chunk(blocks, dim=0), p["A"].chunk(blocks, dim=1), strict=True)
        return s * torch.block_diag(*(b @ a for b, a in parts))

    check_update("ra_lora", change)


@pytest.mark.parametrize(
    ("effective_rank", "blocks"), [(3, 1), (7, 1), (8, 2), (15, 2), (16, 4), (31, 4), (32, 8)]
)
def test_the_number_of_blocks_is_a_power_of_two(effective_rank: int, blocks: int) -> None:
    """n = 2^floor(log2(effective rank / rank)), which is what the authors' code computes."""
    initial = init((64, 48), effective_rank, SETTINGS)
    assert initial.frozen["blocks"].tolist() == [blocks]


def test_blocks_divide_both_sides_and_are_limited() -> None:
    assert init((64, 36), 32, SETTINGS).frozen["blocks"].tolist() == [4]
    limited = RALORA.validate_settings(VariantSettings(4, 8.0, extra={"max_power": 1}))
    assert init((64, 48), 32, limited).frozen["blocks"].tolist() == [2]


def test_each_block_starts_as_lora_on_its_own_inputs() -> None:
    """The published code draws A from N(0, 1) when it is asked for Kaiming's distribution."""
    a = init((64, 48), 32, SETTINGS).trainable["A"]
    bound = math.sqrt(8 / 48)
    assert 0.95 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
