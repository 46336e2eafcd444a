"""LoRAN's update, computed independently."""

from __future__ import annotations

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants.api import Params, VariantSettings


@pytest.mark.parametrize(("amplitude", "frequency"), [(None, None), (0.4, 2.5)])
def test_the_update_is_a_function_of_the_low_rank_product(
    amplitude: float | None, frequency: float | None
) -> None:
    """The defaults are the `mlora_af_sin_A` and `mlora_af_sin_omega` of the authors' adapters."""
    size, omega = amplitude or 5e-5, frequency or 1e4

    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        z = torch.einsum("or,ri->oi", params["B"], params["A"])
        return (size * torch.sin(omega * z) * z + z) * s

    extra = {} if amplitude is None else {"amplitude": amplitude, "frequency": frequency}
    check_update("lora_n", change, settings=VariantSettings(4, 8.0, extra=extra))
