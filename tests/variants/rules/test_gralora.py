"""GraLoRA's rule, with and without the hybrid, and its initialization."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from rule import adapt, check_update
from torch import Tensor

from variants.api import UnsupportedError, VariantSettings


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    count, ranks = len(params["A"]), params["A"].shape[2] // len(params["A"])
    grid = []
    for j in range(count):
        row = []
        for n in range(count):
            down = params["A"][n][:, j * ranks : (j + 1) * ranks].T  # (ranks, in / k)
            up = params["B"][j][n * ranks : (n + 1) * ranks].T  # (out / k, ranks)
            row.append(up @ down)
        grid.append(torch.cat(row, dim=1))
    matrix, rank = torch.cat(grid), settings.rank
    if "HA" in params:
        matrix, rank = matrix + params["HB"] @ params["HA"], rank + len(params["HA"])
    return settings.alpha / rank * matrix


@pytest.mark.parametrize(("blocks", "hybrid_rank"), [(2, 0), (4, 3), (1, 1)])
def test_each_block_of_the_grid_has_a_lora(blocks: int, hybrid_rank: int) -> None:
    extra = {"blocks": blocks, "hybrid_rank": hybrid_rank}
    check_update("gralora", change, VariantSettings(8, 6.0, extra=extra))


def test_the_factors_on_the_output_side_begin_at_zero() -> None:
    settings = VariantSettings(4, extra={"blocks": 2, "hybrid_rank": 3})
    for layer in adapt("gralora", settings, perturb=False).layers.values():
        tensors, (out_features, in_features) = layer.lane_tensors("0"), layer.frozen_layer.shape
        assert tensors["A"].shape == (2, in_features // 2, 4)
        assert tensors["B"].shape == (2, 4, out_features // 2)
        assert not tensors["B"].any()
        assert not tensors["HB"].any()
        for name, fan_in in (("A", in_features // 2), ("HA", in_features)):
            assert 0.8 * fan_in**-0.5 < tensors[name].abs().max() <= fan_in**-0.5, name


def test_the_update_has_a_higher_rank_than_that_of_lora() -> None:
    adapters = adapt("gralora", VariantSettings(4, 8.0))
    for layer in adapters.layers.values():
        matrix = adapters.variant.delta_weight(
            layer.lane_tensors("0"), layer.frozen_layer.with_settings(adapters.lane_settings("0"), 2.0)
        )
        assert torch.linalg.matrix_rank(matrix) == 2 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VariantSettings(3), "rank 3: must be a multiple of blocks 2"),
        (VariantSettings(16, extra={"blocks": 16}), r"there\.0 has 24 inputs: blocks 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: VariantSettings, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        adapt("gralora", settings)
