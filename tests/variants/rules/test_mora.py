"""MoRA's rule in the two forms that its authors recommend, and its initialization."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from rule import adapt, check_update
from torch import Tensor

from variants.api import UnsupportedError, VariantSettings


def rotation_matrix(piece: int, size: int) -> Tensor:
    """Return RoPE's rotation (size, size) of a piece of the input."""
    matrix, half = torch.zeros(size, size, dtype=torch.float64), size // 2
    for pair in range(half):
        angle = piece / 10000 ** (2 * pair / size)
        matrix[pair, pair] = matrix[pair + half, pair + half] = math.cos(angle)
        matrix[pair, pair + half], matrix[pair + half, pair] = -math.sin(angle), math.sin(angle)
    return matrix


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    (out_features, in_features), m = weight.shape, params["M"]
    size = len(m)
    count = math.ceil(in_features / size)
    matrix = torch.zeros_like(weight)
    for row in range(out_features):
        for piece in range(count):
            if settings["maps"] == "rotation" and piece != row // size % count:
                continue
            is_rotated = settings["maps"] == "rotation"
            values = (m @ rotation_matrix(piece, size) if is_rotated else m)[row % size]
            columns = torch.arange(piece * size, (piece + 1) * size) % in_features
            matrix = matrix.index_put((torch.tensor(row), columns), values, accumulate=True)
    return matrix


@pytest.mark.parametrize(
    ("maps", "rank", "size"), [("rotation", 3, 14), ("sharing", 3, 14), ("sharing", 1, 8)]
)
def test_a_square_matrix_learns_between_fixed_maps(maps: str, rank: int, size: int) -> None:
    settings = VariantSettings(rank, alpha=5.0, extra={"maps": maps})
    check_update("mora", change, settings)
    for tensor in adapt("mora", settings, perturb=False).trainable("0").values():
        assert tensor.shape == (size, size)
        assert not tensor.any()


def test_the_size_of_the_matrix_is_even_only_where_pairs_are_rotated() -> None:
    for maps, size in (("rotation", 10), ("sharing", 11)):
        settings = VariantSettings(2, extra={"maps": maps})
        tensors = adapt("mora", settings, perturb=False).trainable("0")
        assert {tuple(tensor.shape) for tensor in tensors.values()} == {(size, size)}


def test_a_matrix_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"there.0 \(40 x 24\): rank 12 gives M the size 28; it must"):
        adapt("mora", VariantSettings(12))
