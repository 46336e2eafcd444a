"""Update rules of the variants that multiply the weight or its inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from rule import adapt, check_update, layer_of
from torch import Tensor, nn

from variants import catalogue
from variants.adapters import Adapters, check_fit
from variants.api import FrozenLayer, UnsupportedError, VariantSettings
from variants.linalg import (
    cayley_change,
    multiply_blocks,
    multiply_rank_one,
    nearest_divisor,
    neumann_change,
    skew_symmetric,
)
from variants.testing.rig import Case, attach_lanes, lane_outputs

# BOFT with one and with several butterfly factors, whose permutations are those of PEFT.


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 3)])
def test_boft_a_product_of_permuted_rotations(size: int, factors: int) -> None:
    def change(params, weight, settings, s):
        features = weight.shape[1]
        rotation = torch.eye(features, dtype=weight.dtype)
        for factor, matrices in enumerate(params["M"]):
            eye = torch.eye(size, dtype=weight.dtype)
            skews = [(m - m.T) / 2 for m in matrices]
            blocks = torch.block_diag(*[(eye - q) @ torch.inverse(eye + q) for q in skews])
            order = BOFTLayer.block_butterfly_perm(
                None, features, features // size // 2**factor, size // 2, factors - 1
            )
            permutation = BOFTLayer.perm2mat(None, order).to(weight.dtype)
            rotation = permutation @ blocks @ permutation.T @ rotation
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(features, dtype=weight.dtype))
        return params["s"] * (weight @ rotation.T) - weight

    check_update("boft", change, settings=VariantSettings(extra={"block_size": size, "factors": factors}))


def test_boft_a_layer_that_the_factors_do_not_divide_is_refused() -> None:
    variant = catalogue.get("boft")
    settings = variant.validate_settings(VariantSettings(extra={"block_size": 8, "factors": 2}))
    check_fit(variant, layer_of("q_proj", (24, 48), settings))
    with pytest.raises(UnsupportedError, match="k_proj has 40 inputs: not a multiple of 16"):
        check_fit(variant, layer_of("k_proj", (24, 40), settings))


def test_boft_odd_blocks_of_several_factors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="block_size 3: must be even for more than one factor"):
        catalogue.get("boft").validate_settings(VariantSettings(extra={"block_size": 3, "factors": 2}))


# ETHER and ETHER+, against block-diagonal matrices of reflections.


def _projections(vectors: Tensor) -> Tensor:
    return torch.block_diag(*[torch.outer(u, u) / (u @ u) for u in vectors])


def test_ether_vectors_begin_kaiming_uniform_and_in_opposed_pairs() -> None:
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


def test_ether_a_layer_that_has_no_equal_blocks_is_refused() -> None:
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


def test_ether_one_block_equals_the_authors_code() -> None:
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
def test_ether_one_reflection_for_each_block_of_inputs(blocks: int) -> None:
    def change(params, weight, settings, s):
        return -2 * weight @ _projections(params["u"])

    check_update("ether", change, settings=VariantSettings(extra={"blocks": blocks}))


@pytest.mark.parametrize("blocks", [1, 4])
def test_ether_two_projections_on_either_side(blocks: int) -> None:
    def change(params, weight, settings, s):
        rows, columns = (torch.eye(size, dtype=weight.dtype) for size in weight.shape)
        left = rows - _projections(params["u_out"]) + _projections(params["v_out"])
        right = columns - _projections(params["u"]) + _projections(params["v"])
        return left @ weight @ right - weight

    check_update("ether_plus", change, settings=VariantSettings(extra={"blocks": blocks}))


# HRA, against a product of Householder matrices.


@pytest.mark.parametrize("rank", [2, 6])
def test_hra_a_chain_of_reflections(rank: int) -> None:
    def change(params, weight, settings, s):
        product = weight
        for u in params["U"].T:
            product = product @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
        return product - weight

    check_update("hra", change, settings=VariantSettings(rank))


def test_hra_each_pair_begins_with_equal_vectors_as_in_peft() -> None:
    for layer in adapt("hra", VariantSettings(8), perturb=False).layers.values():
        u = layer.lane_tensors("0")["U"]
        assert u.shape == (layer.frozen_layer.shape[1], 8)
        assert torch.equal(u[:, ::2], u[:, 1::2])
        reference = nn.init.kaiming_uniform_(torch.empty(len(u), 4), a=math.sqrt(5))
        for values in (u, reference):
            assert 0.95 * 0.5 < values.abs().max() <= 0.5


def test_hra_an_odd_rank_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"rank 3: .* it must be even"):
        catalogue.get("hra").validate_settings(VariantSettings(3))


def test_hra_a_merge_over_bfloat16_is_computed_in_float32() -> None:
    hra, noise = catalogue.get("hra"), torch.Generator().manual_seed(0)
    weight, u = torch.randn(40, 24, generator=noise).bfloat16(), torch.randn(24, 4, generator=noise)
    layer = FrozenLayer("layer", weight, None).with_settings(VariantSettings(4, None))
    exact = FrozenLayer("layer", weight.double(), None).with_settings(VariantSettings(4, None))
    merged, expected = hra.delta_weight({"U": u}, layer), hra.delta_weight({"U": u.double()}, exact)
    assert merged.dtype == torch.float32
    assert (merged - expected).norm() < 1e-5 * expected.norm()


# IA3: one factor for each output.


def test_ia3_each_output_has_a_factor() -> None:
    check_update(
        "ia3",
        lambda params, weight, settings, s: (params["l"] - 1) * weight,
        change_bias=lambda params, bias, settings: (params["l"][:, 0] - 1) * bias,
    )


# OFT and its Cayley transforms, against loops over the blocks.


def _skew(values: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size, dtype=values.dtype)
    remaining = iter(values)
    for row in range(size):
        for column in range(row + 1, size):
            value = next(remaining)
            q[row, column], q[column, row] = value, -value
    return q


@pytest.mark.parametrize("terms", [4, 5, 7])
def test_oft_the_series_of_rotations(terms: int) -> None:
    def change(params, weight, settings, s):
        size = weight.shape[1] // len(params["Q"])
        blocks = []
        for values in params["Q"]:
            q = _skew(values, size)
            r = torch.linalg.matrix_power(q, 0) + torch.linalg.matrix_power(q, terms - 1)
            blocks.append(r + 2 * sum(torch.linalg.matrix_power(q, power) for power in range(1, terms - 1)))
        return weight @ torch.block_diag(*blocks).T - weight

    check_update("oft", change, settings=VariantSettings(extra={"block_size": 8, "terms": terms}))


def test_oft_the_exact_rotation() -> None:
    def change(params, weight, settings, s):
        size = weight.shape[1] // len(params["Q"])
        eye = torch.eye(size, dtype=weight.dtype)
        skews = [_skew(values, size) for values in params["Q"]]
        blocks = [(eye - q) @ torch.inverse(eye + q) for q in skews]
        for block in blocks:
            torch.testing.assert_close(block @ block.T, eye)
        return weight @ torch.block_diag(*blocks).T - weight

    check_update("oft", change, settings=VariantSettings(extra={"block_size": 8, "cayley_neumann": False}))


@pytest.mark.parametrize(
    ("features", "wanted", "size"), [(4096, 32, 32), (24, 32, 24), (40, 32, 40), (60, 16, 15)]
)
def test_oft_a_block_size_that_does_not_divide_is_replaced_as_in_peft(
    features: int, wanted: int, size: int
) -> None:
    from peft.tuners.oft.layer import OFTLayer

    assert nearest_divisor(features, wanted) == size
    if features % wanted:
        assert OFTLayer.adjust_oft_parameters(None, features, wanted) == size


# PSOFT, against the rotation of W's principal part.


def test_psoft_the_principal_part_is_rotated_and_scaled() -> None:
    def change(params, weight, settings, s):
        rank = settings.rank
        q, (rows, columns) = weight.new_zeros(rank, rank), torch.triu_indices(rank, rank, 1)
        q = q.index_put((rows, columns), params["Q"])
        q, eye = q - q.T, torch.eye(rank, dtype=weight.dtype)
        rotation = (eye + q) @ torch.inverse(eye - q)
        u, singular_values, vh = torch.linalg.svd(weight)
        ours = params["US"] @ params["Vh"]
        torch.testing.assert_close(ours, u[:, :rank] * singular_values[:rank] @ vh[:rank], rtol=0, atol=1e-5)
        scaled = torch.diag(params["b"]) @ rotation @ torch.diag(params["a"])
        return params["US"] @ scaled @ params["Vh"] - ours

    check_update("psoft", change, settings=VariantSettings(4))


# RoAd's three forms, against a matrix that is filled pair by pair.


def _matrix(params: Mapping[str, Tensor], settings: VariantSettings, size: int) -> Tensor:
    group_size = settings["group_size"]
    half, matrix = group_size // 2, params["theta"].new_zeros(size, size)
    for group in range(size // group_size):
        for pair in range(half):
            first = group * group_size + pair
            second, start = first + half, first + group * group_size
            places = {
                "road_1": [group * half + pair] * 4,
                "road_2": [first, first, second, second],
                "road_4": [start, start + group_size, start + half, start + group_size + half],
            }[settings["form"]]
            cos = params["scale"][places] * params["theta"][places].cos()
            sin = params["scale"][places] * params["theta"][places].sin()
            matrix[first, first], matrix[first, second] = cos[0], -sin[1]
            matrix[second, second], matrix[second, first] = cos[2], sin[3]
    return matrix


def test_road_a_group_that_does_not_divide_the_outputs_is_refused() -> None:
    variant = catalogue.get("road")
    settings = variant.validate_settings(VariantSettings(extra={"group_size": 64}))
    with pytest.raises(UnsupportedError, match="k_proj has 96 outputs: group_size 64 does not divide them"):
        check_fit(variant, layer_of("k_proj", (96, 32), settings))


def test_road_an_odd_group_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="group_size 3: must be even"):
        catalogue.get("road").validate_settings(VariantSettings(extra={"group_size": 3}))


@pytest.mark.parametrize("group_size", [2, 8])
@pytest.mark.parametrize("form", ["road_1", "road_2", "road_4"])
def test_road_pairs_of_outputs_are_rotated_and_scaled(form: str, group_size: int) -> None:
    check_update(
        "road",
        lambda params, weight, settings, s: _matrix(params, settings, len(weight)) @ weight - weight,
        VariantSettings(extra={"form": form, "group_size": group_size}),
        change_bias=lambda params, bias, settings: _matrix(params, settings, len(bias)) @ bias - bias,
    )


# Variants that map the input: both ways of computing them agree, and bfloat16 keeps small changes.


SHAPE = {"out_features": 40, "in_features": 24, "bias": True}


def _nudged(name: str, dtype: torch.dtype) -> Adapters:
    """Return a lane whose parameters are 1e-3 away from their initial values, in a model of a data type."""
    case = Case("nudged", dtype=dtype, **SHAPE)  # type: ignore[arg-type]
    adapters = attach_lanes(case, catalogue.get(name), 1, VariantSettings(4, 8.0))
    with torch.no_grad():
        for key, parameter in adapters.trainable("0").items():
            noise = torch.Generator().manual_seed(len(key))
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=noise))
    return adapters


@pytest.mark.parametrize("name", ["oft", "boft", "hra", "ether_plus", "psoft"])
def test_a_change_below_the_precision_of_the_input_reaches_a_bfloat16_layer(name: str) -> None:
    """A rotated input that is rounded to bfloat16 before the product with W would equal the input."""
    small, wide = (_nudged(name, dtype) for dtype in (torch.bfloat16, torch.float32))
    for path in ("there.0", "back.0"):
        changes = []
        for adapters in (small, wide):
            layer = adapters.layers[path]
            x = torch.randn(8, layer.frozen_layer.shape[1], generator=torch.Generator().manual_seed(0))
            x = x.bfloat16().to(layer.frozen_layer.weight.dtype)
            # With an output of zero in place of the frozen layer's, the change itself is not rounded to it.
            base = x.new_zeros(1, 8, layer.frozen_layer.shape[0])
            stacked = {key: tensor.unsqueeze(0) for key, tensor in layer.lane_tensors("0").items()}
            group = layer.group_layer(("0",))
            prepared = adapters.variant.prepare(stacked, group)
            changes.append(adapters.variant.forward(x.unsqueeze(0), base, prepared, group).float())
        rounded, exact = changes
        assert exact.norm() > 0
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["oft", "boft", "ether_plus"])
def test_the_product_with_the_mapped_input_equals_a_call_of_the_frozen_layer_and_an_update(name: str) -> None:
    adapters = _nudged(name, torch.float32)
    case = Case("nudged", **SHAPE)  # type: ignore[arg-type]
    together = lane_outputs(case, adapters)
    calls = []
    for layer in adapters.layers.values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    apart = lane_outputs(case, adapters)  # a layer with hooks is called
    assert len(calls) == len(adapters.layers)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("size", [4, 5, 10, 15])
def test_blocks_of_any_size_round_alike_for_one_lane_and_for_several(size: int) -> None:
    """Blocks of 5, 10 or 15 values are not aligned in memory, and MKL would sum them in another order."""
    noise = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(3, 40, 4 * size, generator=noise),
        "values": 0.1 * torch.randn(3, 4, size * (size - 1) // 2, generator=noise),
        "left": torch.randn(3, 4, size, generator=noise),
        "right": torch.randn(3, 4, size, generator=noise),
    }

    def outputs(lanes: slice) -> list[Tensor]:
        x, values, left, right = (t[lanes].clone().requires_grad_() for t in tensors.values())
        skew = skew_symmetric(values, size)
        series = neumann_change(skew.flatten(0, 1), 5).unflatten(0, skew.shape[:2])
        rotated = multiply_blocks(multiply_blocks(x, cayley_change(skew)), series)
        result = multiply_rank_one(rotated, left, right)
        return [result, *torch.autograd.grad(result.square().sum(), (x, values, left, right))]

    together = outputs(slice(None))
    for lane in range(3):
        alone = outputs(slice(lane, lane + 1))
        assert all(torch.equal(t[lane : lane + 1], a) for t, a in zip(together, alone, strict=True))
