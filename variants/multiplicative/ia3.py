"""IA3: multiplies each output of a layer by a learned factor."""

from torch import Tensor

from variants import api
from variants.maps import OutputMap


class IA3(api.PeftFormat, OutputMap):
    """W' = diag(l) W and bias' = diag(l) bias, where l (out, 1) has a factor for each output.

    Initialization: l = 1, so W' = W. The paper's learning rate is 3e-3, with Adafactor.

    The paper scales keys, values and the inputs of the second feed-forward layer. In a gated feed-forward
    block, these inputs are a product with the outputs of a linear layer (`up_proj`, T5's `wi_1`), which the
    authors' code scales: targets such as k_proj, v_proj and up_proj give the paper's method.

    Source: paper, Section 3.3; github.com/r-three/t-few, src/models/lora.py and configs/ia3.json.
    """

    paper = "Liu et al., arXiv 2205.05638"
    deviations = """No layer's input is scaled, which a feed-forward block without a gate would need (PEFT's
    `feedforward_modules`)."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_rank = uses_alpha = uses_dropout = False
    typical_lr_scale = 10.0
    peft = api.PeftMethod("IA3", {"l": "ia3_l"}, constants={"feedforward_modules": []})

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return api.InitialTensors({"l": layer.ones(layer.shape[0], 1)})

    def map_output(self, y: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return (y * params["l"].mT).to(y.dtype)
