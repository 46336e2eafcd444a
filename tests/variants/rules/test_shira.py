"""SHiRA's rule and the random positions of its values."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from rule import adapt, check_update
from torch import Tensor

from variants.api import UnsupportedError, VariantSettings


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    rows, columns = params["indices"].long()
    return torch.zeros_like(weight).index_put((rows, columns), params["values"])


def test_the_values_are_added_to_single_weights() -> None:
    check_update("shira", change, VariantSettings(3, alpha=5.0))


def test_the_values_begin_at_zero_at_distinct_random_positions_in_row_major_order() -> None:
    adapters = adapt("shira", VariantSettings(3), perturb=False)
    adapters.add_lane("other seed", adapters.settings, 1)
    seen = []
    for lane in adapters.lanes:
        for name, layer in adapters.layers.items():
            (out_features, in_features), indices = (
                layer.frozen_layer.shape,
                layer.lane_tensors(lane)["indices"],
            )
            assert not indices.is_floating_point()
            assert not adapters.trainable(lane)[f"{name}.values"].any()
            flat = indices[0].long() * in_features + indices[1]
            assert indices.shape == (2, 3 * (out_features + in_features))
            assert torch.equal(flat, flat.unique())
            assert 0 <= flat[0] < flat[-1] < out_features * in_features
            assert indices[1].max() < in_features
            assert len(indices[0].unique()) > 0.9 * out_features, "some rows are never chosen"
            seen.append(tuple(flat.tolist()))
    assert len(set(seen)) == len(seen), "layers or lanes share their positions"


def test_a_layer_with_too_few_weights_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"rank 16 is larger than layer there\.0 allows: at most 15"):
        adapt("shira", VariantSettings(16))
