"""HiRA: the weight times a low-rank matrix, elementwise."""

import torch
from torch import Tensor

from variants import api


class HiRA(api.PeftFormat, api.DenseUpdate):
    """W' = W + W * (B A), elementwise; the update has a high rank although B A does not. There is no alpha.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    The size of the weights (about 0.02) scales every step, so HiRA needs 10 to 100 times LoRA's learning
    rate.

    Source: PEFT's HIRA. The authors' code (hqsiswiliam/hira) has the same rule and initialization.
    """

    paper = "Huang et al., ICLR 2025, OpenReview TwJrTz9cRS"
    year = 2025
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    numerics = 2
    uses_alpha = False
    typical_lr_scale = 10.0
    peft = api.PeftMethod("HIRA", {"A": "hira_A", "B": "hira_B"}, dropout="hira_dropout")

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        a, b = (params[name].to(layer.weight.dtype) for name in "AB")
        return layer.weight * torch.bmm(b, a)
