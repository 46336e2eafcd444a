"""IA3: one factor for each output."""

from __future__ import annotations

from rule import check_update


def test_each_output_has_a_factor() -> None:
    check_update(
        "ia3",
        lambda params, weight, settings, s: (params["l"] - 1) * weight,
        change_bias=lambda params, bias, settings: (params["l"][:, 0] - 1) * bias,
    )
