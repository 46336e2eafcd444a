"""Singular value decompositions, rotations, and products with sparse or block-diagonal matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from variants import api


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


class WeightSVD(api.Calibrated, api.LowRank):
    """A product of factors that starts from the largest or smallest singular triplets of W = U S V^T.

    The triplets are computed once for each base model, rank and `svd`, and do not depend on a lane's seed.
    """

    calibration_statistic = api.CalibrationStatistic.WEIGHT
    hyperparameters = {
        "svd": api.Choice(
            "exact", ("exact",), or_count="a number of power iterations, such as 16",
            help="'exact', or the number of power iterations of a randomized SVD",
        )
    }  # fmt: skip
    smallest: ClassVar[bool] = False
    """True for the smallest triplets, which only an exact SVD finds: such a variant has no `svd`."""

    def triplet_count(self, settings: api.VariantSettings) -> int:
        """Return the number r of singular triplets that a lane can use at most; by default its rank."""
        return settings.rank

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        """Return r singular triplets in descending order: "U" (out, r), "S" (r,) and "Vh" = V^T (r, in)."""
        count, svd = self.triplet_count(layer.settings), str(layer.settings.extra.get("svd", "exact"))
        u, s, vh = (
            torch.linalg.svd(matrix, full_matrices=False)
            if svd == "exact"
            else randomized_svd(matrix, count, int(svd), api.stable_seed(layer.name, count))
        )
        kept = slice(len(s) - count, None) if self.smallest else slice(count)
        return {"U": u[:, kept].contiguous(), "S": s[kept].contiguous(), "Vh": vh[kept].contiguous()}


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
    """Return the number of zeros to append, so that the size becomes a multiple of 4.

    Each float32 matrix of a batch then begins at a multiple of 16 bytes. MKL sums unaligned matrices in
    another order, so a lane's result would depend on its position among the lanes.
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
