"""Batch-invariant products give the same bits for every batch size."""

from __future__ import annotations

import pytest
import torch

from variants.api import baddbmm, bmm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(4, 40, 24), (24, 40, 4), (40, 4, 24), (40, 24, 1), (40, 1, 24), (40, 1, 1)]
)
def test_a_batch_of_one_equals_one_of_several(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = sizes
    noise = torch.Generator().manual_seed(0)
    for _ in range(500):
        x = torch.randn(3, rows, inner, generator=noise).to(dtype)
        y = torch.randn(3, inner, columns, generator=noise).to(dtype)
        base = torch.randn(3, rows, columns, generator=noise).to(dtype)
        assert torch.equal(bmm(x, y)[:1], bmm(x[:1], y[:1]))
        assert torch.equal(baddbmm(base, x, y)[:1], baddbmm(base[:1], x[:1], y[:1]))
