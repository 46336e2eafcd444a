"""OFT and its Cayley transforms, against loops over the blocks."""

from __future__ import annotations

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants.api import VariantSettings
from variants.rotations import nearest_divisor


def _skew(values: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size, dtype=values.dtype)
    remaining = iter(values)
    for row in range(size):
        for column in range(row + 1, size):
            value = next(remaining)
            q[row, column], q[column, row] = value, -value
    return q


@pytest.mark.parametrize("terms", [4, 5, 7])
def test_the_series_of_rotations(terms: int) -> None:
    def change(params, weight, settings, s):
        size = weight.shape[1] // len(params["Q"])
        blocks = []
        for values in params["Q"]:
            q = _skew(values, size)
            r = torch.linalg.matrix_power(q, 0) + torch.linalg.matrix_power(q, terms - 1)
            blocks.append(r + 2 * sum(torch.linalg.matrix_power(q, power) for power in range(1, terms - 1)))
        return weight @ torch.block_diag(*blocks).T - weight

    check_update("oft", change, settings=VariantSettings(extra={"block_size": 8, "terms": terms}))


def test_the_exact_rotation() -> None:
    def change(params, weight, settings, s):
        size = weight.shape[1] // len(params["Q"])
        eye = torch.eye(size, dtype=weight.dtype)
        skews = [_skew(values, size) for values in params["Q"]]
        blocks = [(eye - q) @ torch.inverse(eye + q) for q in skews]
        for block in blocks:
            torch.testing.assert_close(block @ block.T, eye)
        return weight @ torch.block_diag(*blocks).T - weight

    check_update("oft", change, settings=VariantSettings(extra={"block_size": 8, "cayley_neumann": False}))


@pytest.mark.parametrize(
    ("features", "wanted", "size"), [(4096, 32, 32), (24, 32, 24), (40, 32, 40), (60, 16, 15)]
)
def test_a_block_size_that_does_not_divide_is_replaced_as_in_peft(
    features: int, wanted: int, size: int
) -> None:
    from peft.tuners.oft.layer import OFTLayer

    assert nearest_divisor(features, wanted) == size
    if features % wanted:
        assert OFTLayer.adjust_oft_parameters(None, features, wanted) == size
