"""Singular value decompositions, and matrices with values at a few positions."""

from __future__ import annotations

import torch
from torch import Tensor


def randomized_svd(
    weight: Tensor, count: int, iterations: int, seed: int, columns: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T of the `count` largest triplets by a randomized SVD.

    Halko, Martinsson and Tropp (2011, arXiv 0909.4061), algorithms 4.4 and 5.1. The global random state of
    torch is not used.

    Args:
        weight: (out, in).
        count: The number of triplets, where the weight has so many.
        iterations: The number of power iterations.
        seed: The seed of the random projection.
        columns: The number of columns of the random projection; by default `count` + 10.
    """
    columns = min(columns or count + 10, *weight.shape)
    noise = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(weight @ noise.to(weight))[0]
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return (q @ u)[:, :count], s[:count], vh[:count]


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of singular vectors with signs that do not depend on the linear algebra library.

    An SVD determines a pair (u, v) up to a common sign. Here the entry of each v with the largest absolute
    value is positive.

    Args:
        u: (out, r).
        vh: (r, in).
    """
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return u * signs.t(), signs * vh


def fill_positions(values: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return matrices (K, out, in) that are zero except for values (K, count) at positions (K, 2, count).

    Args:
        values: The values, (K, count).
        positions: Their rows and columns, (K, 2, count), without repetition (`LayerRandom.positions`).
        shape: (out, in).
    """
    rows, columns = positions.long().unbind(1)
    flat = values.new_zeros(len(values), shape[0] * shape[1])
    return flat.scatter(1, rows * shape[1] + columns, values).view(-1, *shape)
