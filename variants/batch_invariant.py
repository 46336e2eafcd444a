"""Matrix products whose result for a lane does not depend on the number of lanes in the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_rank_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pad factors of rank 1 with a second rank of zeros; return factors of a higher rank unchanged.

    PyTorch sums a product with a single column in another order for one lane than for several, so a lane's
    result would depend on the other lanes. The result still depends on them if a lane has a single row of one
    position (N = 1), where products with x have a single column, because x is not padded. With fewer than 8
    rows per lane, the frozen layer's product may also depend on the number of lanes.

    Args:
        a: (K, rank, in).
        b: (K, out, rank).
    """
    if a.shape[1] > 1:
        return a, b
    return torch.nn.functional.pad(a, (0, 0, 0, 1)), torch.nn.functional.pad(b, (0, 1))


def batch_invariant_bmm(x: Tensor, y: Tensor) -> Tensor:
    """Return `torch.bmm(x, y)`, with the same bits for one lane as for several.

    In bfloat16 on a CPU, PyTorch uses another kernel for a batch of one, with other last bits. There the
    product is computed twice in a batch of two.

    Args:
        x: (K, n, m).
        y: (K, m, p).
    """
    if _needs_second_copy(x):
        return torch.bmm(torch.cat([x, x]), torch.cat([y, y]))[:1]
    return torch.bmm(x, y)


def batch_invariant_baddbmm(base: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return `torch.baddbmm(base, x, y)`, with the same bits for one lane as for several.

    Args:
        base: (K, n, p).
        x: (K, n, m).
        y: (K, m, p).
    """
    if _needs_second_copy(x):
        return torch.baddbmm(*(torch.cat([tensor, tensor]) for tensor in (base, x, y)))[:1]
    return torch.baddbmm(base, x, y)


def batch_invariant_baddbmm_(base: Tensor, x: Tensor, y: Tensor) -> None:
    """Add `torch.bmm(x, y)` to `base` in place, with the same bits for one lane as for several.

    Args:
        base: (K, n, p).
        x: (K, n, m).
        y: (K, m, p).
    """
    if _needs_second_copy(x):
        base.copy_(batch_invariant_baddbmm(base, x, y))
    else:
        base.baddbmm_(x, y)


def _needs_second_copy(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) == 1
