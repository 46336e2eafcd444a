"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS): the weight times a low-rank matrix, elementwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import (
    Batching,
    FrozenLayer,
    InitialTensors,
    Params,
    Variant,
    VariantSettings,
    VerifiedBy,
    batch_invariant_baddbmm,
    lora_init,
    pad_rank_one,
)


class HiRA(Variant):
    """W' = W + W * (B A), elementwise; the update has a high rank although B A does not. There is no alpha.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    Parameters: rank * (in + out) per layer.

    The size of the weights (about 0.02) scales every step, so HiRA needs 10 to 100 times LoRA's learning
    rate.
    """

    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    axis: ClassVar[str] = "rank"
    paper: ClassVar[str] = "openreview:TwJrTz9cRS"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.REFERENCE_IMPLEMENTATION
    batching: ClassVar[Batching] = Batching.DENSE
    uses_alpha: ClassVar[bool] = False

    def scaling(self, settings: VariantSettings) -> float:
        return 1.0

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        return lora_init(layer, settings, generator)

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        a, b = pad_rank_one(params["A"], params["B"])
        return {"dW": layer.weight * torch.bmm(b, a)}

    def forward(
        self, x: Tensor, base_output: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor
    ) -> Tensor:
        return batch_invariant_baddbmm(base_output, x, params["dW"].to(x.dtype).transpose(1, 2))

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        return layer.weight * (params["B"] @ params["A"])

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        return settings.rank * (in_features + out_features)

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor] | None:
        return {"hira_A": params["A"], "hira_B": params["B"]}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": settings.rank, "hira_dropout": settings.dropout}

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings | None:
        if config.get("peft_type") != "HIRA":
            return None
        return VariantSettings(config["r"], None, float(config.get("hira_dropout", 0.0)))

    def init_from_peft(
        self, tensors: Mapping[str, Tensor], layer: FrozenLayer, settings: VariantSettings
    ) -> InitialTensors:
        return InitialTensors({"A": tensors["hira_A"], "B": tensors["hira_B"]})
