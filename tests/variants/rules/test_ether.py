"""ETHER and ETHER+, against block-diagonal matrices of reflections."""

from __future__ import annotations

import pytest
import torch
from rule import adapt, check_update, layer_of
from torch import Tensor

from variants import catalogue
from variants.api import UnsupportedError, VariantSettings
from variants.attach import check_fit


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
        check_fit(variant, layer_of("q_proj", (8, 8), settings))
        with pytest.raises(UnsupportedError, match="q_proj"):
            check_fit(variant, layer_of("q_proj", shape, settings))


def _product_of_the_authors(weight: Tensor, right: Tensor, left: Tensor | None = None) -> Tensor:
    """Return W' as the authors' ETHERLinear computes it.

    Args:
        weight: W (out, in).
        right: The blocks for the inputs, (n, in / n, in / n).
        left: The blocks for the outputs, (n, out / n, out / n), of ETHER+.
    """
    parts = weight.reshape(len(right), -1, right.shape[1])  # for n > 1 these are no blocks of inputs
    product = (parts @ right).reshape(weight.shape)
    if left is None:
        return product
    return (left @ product.reshape(len(left), left.shape[1], -1)).reshape(weight.shape)


def test_one_block_equals_the_authors_code() -> None:
    def reflect(params, weight, settings, s):
        u = params["u"]  # (1, in)
        block = torch.eye(u.shape[1]) - 2 * u.mT @ u / (u @ u.mT)
        return _product_of_the_authors(weight, block.unsqueeze(0)) - weight

    check_update("ether", reflect)


@pytest.mark.parametrize("blocks", [1, 4])
def test_ether_plus_equals_the_authors_code_but_for_several_blocks_of_inputs(blocks: int) -> None:
    def opposed(u: Tensor, v: Tensor) -> Tensor:
        units = [each / each.norm(dim=1, keepdim=True) for each in (u, v)]
        products = [each.unsqueeze(2) * each.unsqueeze(1) for each in units]
        return torch.eye(u.shape[1]) - products[0] + products[1]

    for layer in adapt("ether_plus", VariantSettings(extra={"blocks": blocks})).layers.values():
        params, frozen = dict(layer.lane_tensors("0")), layer.frozen_layer
        if blocks > 1:
            params["v"] = -params["u"]  # H_in = I
        expected = _product_of_the_authors(
            frozen.weight, opposed(params["u"], params["v"]), opposed(params["u_out"], params["v_out"])
        )
        change = catalogue.get("ether_plus").delta_weight(params, frozen)
        torch.testing.assert_close(frozen.weight + change, expected, rtol=1e-9, atol=1e-9)


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
