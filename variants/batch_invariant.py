"""Matrix products whose result for a lane does not depend on the number of lanes in the batch.

PyTorch's products depend on this number in two cases. In bfloat16 on a CPU, PyTorch uses another kernel for a
batch of one; here the product is then computed twice in a batch of two. A product with a single column, or
over a single value, is summed in another order for one lane than for several; here such sides are padded with
zeros.

The result still depends on the other lanes in four cases:

- Each lane has a single row (N = 1).
- A frozen layer of the model is called with few rows per lane. MKL has other kernels for the rows that do not
  fill a block. 8 rows suffice for narrow layers and on AVX2, 16 for layers of width 384 on AVX-512. With
  `MKL_CBWR=COMPATIBLE` only a multiple of 4 rows fills the blocks.
- oneDNN uses its AMX kernels.
- PyTorch computes with several threads, which share out some sums by the size of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def bmm(x: Tensor, y: Tensor) -> Tensor:
    """Return `torch.bmm(x, y)`, with the same bits for one lane as for several.

    Args:
        x: (K, n, m).
        y: (K, m, p).
    """
    if x.size(2) == 1:
        x, y = pad(x, (0, 1)), pad(y, (0, 0, 0, 1))
    if y.size(2) == 1:
        return bmm(x, pad(y, (0, 1)))[:, :, :1]
    if x.dtype is torch.bfloat16 and _needs_second_copy(x):
        return torch.bmm(_twice(x), _twice(y))[:1]
    return torch.bmm(x, y)


def baddbmm(base: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return `torch.baddbmm(base, x, y)`, with the same bits for one lane as for several.

    Args:
        base: (K, n, p).
        x: (K, n, m).
        y: (K, m, p).
    """
    if x.size(2) == 1:
        x, y = pad(x, (0, 1)), pad(y, (0, 0, 0, 1))
    if y.size(2) == 1:
        return base + bmm(x, y)
    if x.dtype is torch.bfloat16 and _needs_second_copy(x):
        return torch.baddbmm(_twice(base), _twice(x), _twice(y))[:1]
    return torch.baddbmm(base, x, y)


def _needs_second_copy(x: Tensor) -> bool:
    return x.device.type == "cpu" and len(x) == 1


def _twice(x: Tensor) -> Tensor:
    """Return a batch of two copies of `x` in its memory layout, on which the order of some sums depends."""
    return torch.cat([x.mT, x.mT]).mT if x.stride(1) == 1 and x.stride(2) != 1 else torch.cat([x, x])
