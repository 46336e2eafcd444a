"""LoKr's rule, its divisors and its initialization."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from rule import adapt, check_update
from torch import Tensor

from variants.api import UnsupportedError, VariantSettings


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    second = params["D"] if "D" in params else params["B"] @ params["A"]
    blocks = [[entry * second for entry in row] for row in params["C"]]
    matrix = torch.cat([torch.cat(row, dim=1) for row in blocks])
    return settings.alpha / settings.rank * matrix


@pytest.mark.parametrize(("rank", "factor"), [(3, -1), (4, -1), (3, 2), (4, 5), (2, 12)])
def test_the_update_is_a_kronecker_product(rank: int, factor: int) -> None:
    check_update("lokr", change, VariantSettings(rank, 6.0, extra={"factor": factor}))


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 5, 16, 60])
def test_the_sides_are_divided_as_in_peft(factor: int) -> None:
    for out_features, in_features in ((40, 24), (60, 48), (17, 36), (96, 13)):
        settings = VariantSettings(1, extra={"factor": factor})
        sizes = {"out_features": out_features, "in_features": in_features}
        for layer in adapt("lokr", settings, perturb=False, **sizes).layers.values():
            first, second = (factorization(side, factor) for side in layer.frozen_layer.shape)
            tensors = layer.lane_tensors("0")
            assert tensors["C"].shape == (first[0], second[0])
            is_low_rank = max(first[1], second[1]) > 2
            assert tensors.keys() == ({"A", "B", "C"} if is_low_rank else {"C", "D"})
            if is_low_rank:
                assert (tensors["B"].shape, tensors["A"].shape) == ((first[1], 1), (1, second[1]))
            else:
                assert tensors["D"].shape == (first[1], second[1])


@pytest.mark.parametrize(("rank", "names"), [(3, {"A", "B"}), (4, {"D"})])
def test_only_the_small_factor_begins_at_zero(rank: int, names: set[str]) -> None:
    for layer in adapt("lokr", VariantSettings(rank), perturb=False).layers.values():
        tensors = layer.lane_tensors("0")
        assert not tensors["C"].any()
        assert tensors.keys() == {"C", *names}
        for name in names:
            bound = tensors[name].shape[1] ** -0.5
            assert 0.8 * bound < tensors[name].abs().max() <= bound, name


def test_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="factor 0: must be at least 1, or -1 for no limit"):
        adapt("lokr", VariantSettings(2, extra={"factor": 0}))
