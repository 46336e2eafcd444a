"""Rotations as functions of skew-symmetric matrices, and products with block-diagonal matrices."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from variants import api


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` nearest to `wanted`, and the smaller one of two such divisors."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def skew_symmetric(values: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices (..., size, size) with these values above the diagonal, row by row.

    Args:
        values: (..., size * (size - 1) / 2).
        size: Number of rows.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=values.device)
    upper = values.new_zeros(*values.shape[:-1], size, size)
    upper[..., rows, columns] = values
    return upper - upper.mT


def cayley_change(skew: Tensor) -> Tensor:
    """Return R - I for the rotation R = (I + Q) (I - Q)^-1, which is 2 Q (I - Q)^-1 and exactly 0 for Q = 0.

    Args:
        skew: The skew-symmetric Q, (..., size, size).
    """
    size, skew = skew.shape[-1], _pad_matrices(skew)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, 2 * skew, left=False)[..., :size, :size]


def neumann_change(skew: Tensor, terms: int) -> Tensor:
    """Return R - I for R = (I + Q) (I + Q + Q^2 + ...), which approximates the Cayley rotation for a small Q.

    Args:
        skew: The skew-symmetric Q, (batch, size, size).
        terms: Number of powers of Q in R, I among them. All have the factor 2 but the first and the last one.
    """
    size, skew = skew.shape[-1], _pad_matrices(skew)
    power, change = skew, 2 * skew
    for _ in range(terms - 3):
        power = torch.bmm(power, skew)
        change = change + 2 * power
    return (change + torch.bmm(power, skew))[:, :size, :size]


def unit_rows(vectors: Tensor) -> Tensor:
    """Return the vectors of the last dimension, each divided by its length."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return the product of each row of `x` with a block-diagonal matrix, (K, N, in).

    Args:
        x: (K, N, in).
        blocks: (K, in / size, size, size), in any dtype.
    """
    _, count, size, _ = blocks.shape
    matrices = _pad_matrices(blocks.to(x.dtype).flatten(0, 1))
    return _join(api.bmm(_split(x, count, size), matrices), x.shape, count, size)


def multiply_rank_one(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return (x l^T) r for each block of `x` with a left vector l and a right vector r, (K, N, in).

    Args:
        x: (K, N, in).
        left: (K, in / size, size), in any dtype.
        right: (K, in / size, size), in any dtype.
    """
    _, count, size = left.shape
    columns, rows = (pad(t.to(x.dtype).flatten(0, 1), (0, _padding(size))) for t in (left, right))
    factors = api.bmm(_split(x, count, size), columns.unsqueeze(2))
    return _join(api.bmm(factors, rows.unsqueeze(1)), x.shape, count, size)


def _padding(size: int) -> int:
    """Return the number of zeros that are appended to a block.

    MKL sums in another order where a matrix of a batch is not aligned to 16 bytes, and then a lane's result
    would depend on its place among the lanes.
    """
    return -size % 4


def _pad_matrices(matrices: Tensor) -> Tensor:
    extra = _padding(matrices.shape[-1])
    return pad(matrices, (0, extra, 0, extra)) if extra else matrices


def _split(x: Tensor, count: int, size: int) -> Tensor:
    parts = x.reshape(len(x), -1, count, size).transpose(1, 2).reshape(len(x) * count, -1, size)
    return pad(parts, (0, _padding(size))) if _padding(size) else parts


def _join(product: Tensor, shape: torch.Size, count: int, size: int) -> Tensor:
    return product[..., :size].unflatten(0, (-1, count)).transpose(1, 2).reshape(shape)
