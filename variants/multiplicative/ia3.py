"""IA3 (Liu et al. 2022, arXiv 2205.05638): multiplies each output of a layer by a learned factor."""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import FrozenLayer, InitialTensors, Params, PeftMethod, VerifiedBy
from variants.output_map import OutputMap


class IA3(OutputMap):
    """W' = diag(l) W and bias' = l bias with a vector l (out, 1).

    Initialization: l = 1, so W' = W. The paper's learning rate is 3e-3.

    The paper scales keys, values and the inputs of the second feed-forward layer. In a gated feed-forward
    block, these inputs are a product with the outputs of a linear layer (`up_proj`, T5's `wi_1`), which the
    authors' code scales: targets such as k_proj, v_proj and up_proj give the paper's method.

    Deviation: no layer's input is scaled, which a feed-forward block without a gate would need (PEFT's
    `feedforward_modules`).

    Source: paper, Section 3.3; github.com/r-three/t-few, src/models/lora.py and configs/ia3.json.
    """

    parameters = "out"
    uses_rank = uses_alpha = uses_dropout = False
    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    typical_lr_scale = 10.0
    peft = PeftMethod(
        "IA3", {"l": "ia3_l"}, rank=None, alpha=None, dropout=None, constants={"feedforward_modules": []}
    )

    def init(self, layer: FrozenLayer, generator: torch.Generator) -> InitialTensors:
        return InitialTensors({"l": torch.ones(layer.shape[0], 1, dtype=layer.dtype, device=layer.device)})

    def map_output(self, y: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return (y * params["l"].mT).to(y.dtype)
