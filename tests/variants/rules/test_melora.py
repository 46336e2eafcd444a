"""MELoRA's rule and initialization."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, UnsupportedError, VariantSettings
from variants.attach import attach
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes

WIDE = Case("wide", out_features=24, in_features=96)


def side_by_side(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Apply each small LoRA to its own part of the inputs (`Linear.forward` of the authors' code)."""
    parts = torch.eye(weight.shape[1], dtype=weight.dtype).chunk(settings["blocks"], dim=1)
    outputs = [s * part @ a.T @ b.T for part, a, b in zip(parts, params["A"], params["B"], strict=True)]
    return torch.cat(outputs, dim=1).T


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_update_is_one_small_lora_for_each_part(blocks: int) -> None:
    check_update("melora", side_by_side, settings=VariantSettings(3, 6.0, extra={"blocks": blocks}))


def test_the_overall_rank_is_the_number_of_blocks_times_the_rank() -> None:
    settings = VariantSettings(3, 6.0, extra={"blocks": 4})
    adapters = attach_lanes(WIDE, catalogue.get("melora"), 1, settings)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    layer = adapters.layers["there.0"]
    change = adapters.variant.delta_weight(
        layer.lane_tensors("0"), layer.frozen_layer.with_settings(adapters.settings, 2.0)
    )
    assert torch.linalg.matrix_rank(change) == 12
    assert sum(p.numel() for p in adapters.trainable("0").values()) == 4 * 3 * (24 + 96)


def test_a_is_kaiming_uniform_for_the_inputs_of_one_block() -> None:
    """The published study's code draws A from N(0, 1) when Kaiming is asked for."""
    case = Case("large", out_features=64, in_features=1024)
    adapters = attach_lanes(case, catalogue.get("melora"), 1, VariantSettings(8, 16.0))
    a = adapters.trainable("0")["there.0.A"]
    expected = torch.nn.init.kaiming_uniform_(torch.empty(1000, 512), a=math.sqrt(5))
    assert a.shape == (2, 8, 512)
    assert a.abs().max() <= 1 / math.sqrt(512)
    torch.testing.assert_close(a.std(), expected.std(), rtol=0.03, atol=0)
    assert not adapters.trainable("0")["there.0.B"].any()


def test_sizes_that_the_blocks_do_not_divide_are_refused_at_attach() -> None:
    settings = VariantSettings(2, 4.0, extra={"blocks": 5})
    with pytest.raises(UnsupportedError, match=r"there\.0 has 96 inputs: blocks 5 does not divide them"):
        attach(WIDE.build(), catalogue.get("melora"), settings)
