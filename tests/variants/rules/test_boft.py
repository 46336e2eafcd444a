"""BOFT with one and with several butterfly factors, whose permutations are those of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from rule import check_update, layer_of

from variants import catalogue
from variants.api import UnsupportedError, VariantSettings
from variants.attach import check_fit


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 3)])
def test_a_product_of_permuted_rotations(size: int, factors: int) -> None:
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


def test_a_layer_that_the_factors_do_not_divide_is_refused() -> None:
    variant = catalogue.get("boft")
    settings = variant.validate_settings(VariantSettings(extra={"block_size": 8, "factors": 2}))
    check_fit(variant, layer_of("q_proj", (24, 48), settings))
    with pytest.raises(UnsupportedError, match="k_proj has 40 inputs: not a multiple of 16"):
        check_fit(variant, layer_of("k_proj", (24, 40), settings))


def test_odd_blocks_of_several_factors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="block_size 3: must be even for more than one factor"):
        catalogue.get("boft").validate_settings(VariantSettings(extra={"block_size": 3, "factors": 2}))
