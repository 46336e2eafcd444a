"""ETHER and ETHER+, against block-diagonal matrices of reflections."""

from __future__ import annotations

import pytest
import torch
from rule import adapt, check_update, layer_of
from torch import Tensor

from variants import catalogue
from variants.api import UnsupportedError, VariantSettings


def _projections(vectors: Tensor) -> Tensor:
    return torch.block_diag(*[torch.outer(u, u) / (u @ u) for u in vectors])


def test_vectors_begin_kaiming_uniform_and_in_opposed_pairs() -> None:
    for name in ("ether", "ether_plus"):
        for layer in adapt(name, VariantSettings(extra={"blocks": 4}), perturb=False).layers.values():
            tensors, (out_features, in_features) = layer.lane_tensors("0"), layer.frozen_layer.shape
            for suffix, features in (("", in_features), ("_out", out_features)):
                if f"u{suffix}" not in tensors:
                    continue
                u, bound = tensors[f"u{suffix}"], (features / 4) ** -0.5
                assert u.shape == (4, features // 4)
                assert 0.8 * bound < u.abs().max() <= bound
                assert name == "ether" or torch.equal(tensors[f"v{suffix}"], -u)


def test_a_layer_that_has_no_equal_blocks_is_refused() -> None:
    for name, shape in (("ether", (8, 30)), ("ether_plus", (8, 30)), ("ether_plus", (30, 8))):
        variant = catalogue.get(name)
        settings = variant.validate_settings(VariantSettings(extra={"blocks": 4}))
        variant.check_layer(layer_of("q_proj", (8, 8), settings))
        with pytest.raises(UnsupportedError, match="q_proj"):
            variant.check_layer(layer_of("q_proj", shape, settings))


@pytest.mark.parametrize("blocks", [1, 4])
def test_one_reflection_for_each_block_of_inputs(blocks: int) -> None:
    def change(params, weight, settings, s):
        return -2 * weight @ _projections(params["u"])

    check_update("ether", change, settings=VariantSettings(extra={"blocks": blocks}))


@pytest.mark.parametrize("blocks", [1, 4])
def test_two_projections_on_either_side(blocks: int) -> None:
    def change(params, weight, settings, s):
        rows, columns = (torch.eye(size, dtype=weight.dtype) for size in weight.shape)
        left = rows - _projections(params["u_out"]) + _projections(params["v_out"])
        right = columns - _projections(params["u"]) + _projections(params["v"])
        return left @ weight @ right - weight

    check_update("ether_plus", change, settings=VariantSettings(extra={"blocks": blocks}))
