"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS): the update is the weight itself times a low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import (
    Checked,
    Kind,
    Layer,
    Params,
    Settings,
    Start,
    Variant,
    baddbmm,
    vanilla_start,
    widened,
)


class HiRA(Variant):
    """W' = W + W * (B A), elementwise: of high rank although B A is not. There is no alpha.

    Start: A = U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W. Parameters: rank * (in + out) a layer. Steps act
    through the weights' own size (about 0.02), so it wants 10 to 100 times LoRA's learning rate.
    """

    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    axis: ClassVar[str] = "rank"
    paper: ClassVar[str] = "openreview:TwJrTz9cRS"
    checked: ClassVar[Checked] = Checked.ORACLE
    kind: ClassVar[Kind] = Kind.DENSE
    uses_alpha: ClassVar[bool] = False

    def scaling(self, settings: Settings) -> float:
        return 1.0

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        return vanilla_start(layer, settings, generator)

    def prepare(self, params: Params, layer: Layer, scaling: Tensor) -> Params:
        a, b = widened(params["A"], params["B"])
        return {"dW": layer.weight * torch.bmm(b, a)}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: Layer, scaling: Tensor) -> Tensor:
        return baddbmm(base, x, params["dW"].to(x.dtype).transpose(1, 2))

    def delta(self, params: Params, layer: Layer, scaling: float) -> Tensor:
        return layer.weight * (params["B"] @ params["A"])

    def parameter_count(self, out_features: int, in_features: int, settings: Settings) -> int:
        return settings.rank * (in_features + out_features)

    def to_peft(self, params: Params, settings: Settings) -> dict[str, Tensor] | None:
        return {"hira_A": params["A"], "hira_B": params["B"]}

    def peft_config(self, settings: Settings) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": settings.rank, "hira_dropout": settings.dropout}

    def from_peft(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != "HIRA":
            return None
        return Settings(config["r"], None, float(config.get("hira_dropout", 0.0)))

    def start_from_peft(self, tensors: Mapping[str, Tensor], layer: Layer, settings: Settings) -> Start:
        return Start({"A": tensors["hira_A"], "B": tensors["hira_B"]})
