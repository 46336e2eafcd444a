"""RoAd's three forms, against a matrix that is filled pair by pair."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from rule import check_update, layer_of
from torch import Tensor

from variants import catalogue
from variants.api import UnsupportedError, VariantSettings
from variants.attach import check_fit


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


def test_a_group_that_does_not_divide_the_outputs_is_refused() -> None:
    variant = catalogue.get("road")
    settings = variant.validate_settings(VariantSettings(extra={"group_size": 64}))
    with pytest.raises(UnsupportedError, match="k_proj has 96 outputs: group_size 64 does not divide them"):
        check_fit(variant, layer_of("k_proj", (96, 32), settings))


def test_an_odd_group_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="group_size 3: must be even"):
        catalogue.get("road").validate_settings(VariantSettings(extra={"group_size": 3}))


@pytest.mark.parametrize("group_size", [2, 8])
@pytest.mark.parametrize("form", ["road_1", "road_2", "road_4"])
def test_pairs_of_outputs_are_rotated_and_scaled(form: str, group_size: int) -> None:
    check_update(
        "road",
        lambda params, weight, settings, s: _matrix(params, settings, len(weight)) @ weight - weight,
        VariantSettings(extra={"form": form, "group_size": group_size}),
        change_bias=lambda params, bias, settings: _matrix(params, settings, len(bias)) @ bias - bias,
    )
