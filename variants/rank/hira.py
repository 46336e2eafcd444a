"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS): the weight times a low-rank matrix, elementwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from variants.base import Batching, FrozenLayer, Params, VariantSettings
from variants.baseline.lora import LoRA
from variants.dense_product import DenseProduct


class HiRA(LoRA):
    """W' = W + W * (B A), elementwise; the update has a high rank although B A does not. There is no alpha.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    Parameters: rank * (in + out) per layer.

    The size of the weights (about 0.02) scales every step, so HiRA needs 10 to 100 times LoRA's learning
    rate.

    W + W * (B A) is formed for one layer and lane at a time (for all lanes of a small layer). In float32 and
    float64 the layer's output is one matrix product of the input and this sum. In bfloat16 the sum would
    round the update away, so the update is a second product, as it is with dropout.
    """

    name: ClassVar[str] = "hira"
    batching: ClassVar[Batching] = Batching.DENSE
    uses_alpha: ClassVar[bool] = False
    peft_method: ClassVar[tuple[str, ...]] = ("HIRA",)
    peft_names: ClassVar[Mapping[str, str]] = {"A": "hira_A", "B": "hira_B"}

    def scaling(self, settings: VariantSettings) -> float:
        return 1.0

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        return params

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        return DenseProduct.apply(x, base, params["A"], params["B"], layer, None)

    def includes_base(self, layer: FrozenLayer) -> bool:
        return layer.stored_weight.dtype == layer.dtype

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        return DenseProduct.apply(x, None, params["A"], params["B"], layer, layer.bias)

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        return layer.weight * (params["B"] @ params["A"])

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": settings.rank, "hira_dropout": settings.dropout}

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings:
        return VariantSettings(config["r"], None, float(config.get("hira_dropout", 0)))
