"""RaSA's rule and initialization."""

from __future__ import annotations

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, UnsupportedError, VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes


def weighted_sum_of_ranks(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Add the layer's own ranks and the pool's, each with its weight, as the authors' code does."""
    rows, columns = [*params["A"], *params["sA"]], [*params["B"].T, *params["sB"].T]
    weights = params["E"].flatten()
    assert len(weights) == len(rows) == len(columns)
    return sum(w * torch.outer(b, a) for w, a, b in zip(weights, rows, columns, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("shared", [1, 3])
def test_the_update_is_a_weighted_sum_of_own_and_shared_ranks(shared: int) -> None:
    settings = VariantSettings(4, 6.0, extra={"shared": shared})
    check_update("rasa", weighted_sum_of_ranks, settings=settings)


def test_shapes_and_initial_values_for_several_layers_of_one_type() -> None:
    settings = VariantSettings(8, 16.0, extra={"shared": 2})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("rasa"), 1, settings)
    tensors = adapters.trainable("0")
    own = "model.layers.1.mlp.down_proj"
    group = "group:model.layers.mlp.down_proj"
    shapes = {
        f"{own}.A": (6, 48), f"{own}.B": (32, 6), f"{own}.E": (6 + 2 * 2, 1),
        f"{group}.sA": (4, 48), f"{group}.sB": (32, 4),
    }  # fmt: skip
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    weights = tensors[f"{own}.E"].flatten()
    torch.testing.assert_close(weights[:6], torch.full((6,), 0.5 * 16 / 6))
    torch.testing.assert_close(weights[6:], torch.full((4,), 0.5 * 16 / 4))
    assert not tensors[f"{own}.B"].any()
    assert not tensors[f"{group}.sB"].any()
    for name in (f"{own}.A", f"{group}.sA"):
        assert 0.8 * 48**-0.5 < tensors[name].abs().max() <= 48**-0.5


def test_types_are_told_apart_by_the_whole_name_without_indices() -> None:
    """GPT-2 has two layers `c_proj` of different shapes in each block."""
    adapters = attach_lanes(Case("gpt2", model="gpt2"), catalogue.get("rasa"), 1)
    groups = {name.rpartition(".")[0] for name in adapters.trainable("0") if name.startswith("group:")}
    assert {"group:transformer.h.attn.c_proj", "group:transformer.h.mlp.c_proj"} < groups


def test_a_pool_that_takes_all_ranks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="shared 4: must be below the rank 4"):
        catalogue.get("rasa").validate_settings(VariantSettings(4, 8.0, extra={"shared": 4}))
