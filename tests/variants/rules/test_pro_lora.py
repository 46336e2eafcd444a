"""PRoLoRA's rule and initialization."""

from __future__ import annotations

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, UnsupportedError, VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes


def expand(chunk: Tensor, copies: int, size: int) -> Tensor:
    """Return (ranks, size): value (k, j) is that of rank k + i * stride in the chunk, for copy i of column j.

    This is `de_reduce` of the authors' code, written for single values.
    """
    ranks, width = chunk.shape
    stride = max(ranks // copies, 1)
    rows = [
        torch.stack([chunk[(k + (j // width) * stride) % ranks, j % width] for j in range(size)])
        for k in range(ranks)
    ]
    return torch.stack(rows)


def rotated_copies(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    shared_a = expand(params["C"], int(settings["in_copies"]), weight.shape[1])
    shared_b = expand(params["D"].T, int(settings["out_copies"]), weight.shape[0])
    return s * (shared_b.T @ shared_a + params["B"] @ params["A"])


@pytest.mark.parametrize(
    ("unshared", "in_copies", "out_copies"),
    [(1, 2, 2), (2, 3, 5), (1, 7, 1), (0, 2, 3)],
    ids=["default", "sizes not divisible", "more copies than ranks", "copies only"],
)
def test_the_update_has_rotated_copies(unshared: int, in_copies: int, out_copies: int) -> None:
    extra = {"unshared": unshared, "in_copies": in_copies, "out_copies": out_copies}
    check_update("pro_lora", rotated_copies, settings=VariantSettings(5, 10.0, extra=extra))


def test_the_update_has_the_full_rank_with_fewer_values() -> None:
    adapters = attach_lanes(
        Case("square", out_features=64, in_features=64),
        catalogue.get("pro_lora"),
        1,
        VariantSettings(8, 16.0),
    )
    for parameter in adapters.trainable("0").values():
        torch.nn.init.normal_(parameter)
    layer = adapters.layers["there.0"]
    change = adapters.variant.delta_weight(
        layer.lane_tensors("0"), layer.frozen_layer.with_settings(adapters.settings, 2.0)
    )
    assert torch.linalg.matrix_rank(change) == 8
    count = sum(p.numel() for n, p in adapters.trainable("0").items() if n.startswith("there.0."))
    assert count == 7 * (32 + 32) + 64 + 64


def test_shared_and_other_ranks_start_with_the_bound_of_the_whole_factor() -> None:
    """The bound 1/sqrt(in) instead of 1/sqrt(in / m) is the paper's rectified initialization."""
    case = Case("wide", out_features=32, in_features=512)
    adapters = attach_lanes(case, catalogue.get("pro_lora"), 1, VariantSettings(8, 16.0))
    tensors = adapters.trainable("0")
    for name in ("there.0.A", "there.0.C"):
        assert 0.95 * 512**-0.5 < tensors[name].abs().max() <= 512**-0.5
    assert not tensors["there.0.B"].any()
    assert not tensors["there.0.D"].any()


def test_a_rank_without_copies_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="unshared 4: must be below the rank 4"):
        catalogue.get("pro_lora").validate_settings(VariantSettings(4, 8.0, extra={"unshared": 4}))
