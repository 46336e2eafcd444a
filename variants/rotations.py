"""Rotations as functions of skew-symmetric matrices, and products with block-diagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import bmm


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
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, 2 * skew, left=False)


def neumann_change(skew: Tensor, terms: int) -> Tensor:
    """Return R - I for R = (I + Q) (I + Q + Q^2 + ...), which approximates the Cayley rotation for a small Q.

    Args:
        skew: The skew-symmetric Q, (batch, size, size).
        terms: Number of powers of Q in R, I among them. All have the factor 2 but the first and the last one.
    """
    power = skew
    change = 2 * skew
    for _ in range(terms - 3):
        power = torch.bmm(power, skew)
        change = change + 2 * power
    return change + torch.bmm(power, skew)


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return the product of each row of `x` with a block-diagonal matrix, (K, N, in).

    Args:
        x: (K, N, in).
        blocks: (K, in / size, size, size), in any dtype.
    """
    lanes, count, size, _ = blocks.shape
    parts = x.reshape(lanes, -1, count, size).transpose(1, 2).reshape(lanes * count, -1, size)
    product = bmm(parts, blocks.to(x.dtype).flatten(0, 1))
    return product.view(lanes, count, -1, size).transpose(1, 2).reshape(x.shape)


def unit_rows(vectors: Tensor) -> Tensor:
    """Return the vectors of the last dimension, each divided by its length."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def multiply_rank_one(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return (x l^T) r for each block of `x` with a left vector l and a right vector r, (K, N, in).

    Args:
        x: (K, N, in).
        left: (K, in / size, size), in any dtype.
        right: (K, in / size, size), in any dtype.
    """
    lanes, count, size = left.shape
    parts = x.reshape(lanes, -1, count, size).transpose(1, 2).reshape(lanes * count, -1, size)
    factors = bmm(parts, left.to(x.dtype).reshape(lanes * count, size, 1))
    product = factors * right.to(x.dtype).reshape(lanes * count, 1, size)
    return product.view(lanes, count, -1, size).transpose(1, 2).reshape(x.shape)
