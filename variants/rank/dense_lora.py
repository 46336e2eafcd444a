"""DenseLoRA (Mu et al. 2025, arXiv 2505.23808): layers of a type share encoder and decoder."""

from __future__ import annotations

from torch import Generator, Tensor
from torch.nn.functional import gelu

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Int,
    Layers,
    Params,
    Variant,
    VerifiedBy,
    bmm,
    kaiming_init,
    shared_settings,
)
from variants.shared_factors import SharedFactors, shared_lora_init


class DenseLoRA(SharedFactors, Variant):
    """y = x W^T + s gelu(gelu(x A^T) M^T B^T), with M (r, r) of one layer, and shared A (r, in), B (out, r).

    All layers whose names differ only in indices share A and B. r = `rank_factor` * rank, and
    s = alpha / rank. The update is not linear in x, so it cannot be merged.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), M from U(-1/sqrt(r), 1/sqrt(r)), B = 0, so y = x W^T.

    Defaults: at rank 8 and alpha 16, `rank_factor` 24 gives the published study's r = 192 with alpha 384.

    Deviations: the authors' code also drops out values before M and after B. As published it adapts nothing:
    it asks for the type "denselora" and sets "denseLora".

    Source: `tuners/lora.py` of the authors' code (mulin-ahu/DenseLoRA), which has the two GELU.
    """

    parameters = "rank * rank_factor * rank * rank_factor"
    shared_parameters = "rank * rank_factor * (in + out)"
    hyperparameters = {"rank_factor": Int(24, help="size r of M, divided by the rank")}
    is_mergeable = False
    is_rank_limited_by_layer = False
    verified_by = VerifiedBy.AUTHORS_CODE

    def init_layer_group(self, layers: Layers, generator: Generator) -> InitialTensors:
        settings = shared_settings(layers)
        return shared_lora_init(layers, settings.rank * settings["rank_factor"], generator)

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        r = layer.settings.rank * layer.settings["rank_factor"]
        return InitialTensors({"M": kaiming_init("M", (r, r), layer, generator)})

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        out_features, in_features = layer.shape
        return {**params, "A": params["A"][..., :in_features], "B": params["B"][:, :out_features]}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        a, m, b = (params[name].to(x.dtype).transpose(1, 2) for name in "AMB")
        return base + layer.scaling.to(x.dtype) * gelu(bmm(bmm(gelu(bmm(x, a)), m), b))
