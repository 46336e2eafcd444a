"""VeRA: two random matrices for all layers; only vectors learn."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variants import api
from variants.hooks import largest_sides


class VeRA(api.SharedTensors, api.LowRank):
    """W' = W + diag(b) B diag(d) A with trainable vectors b (out,) and d (r,). There is no alpha.

    A (r, in) and B (out, r) are slices of two frozen random matrices that all layers share. These have the
    largest `in` and the largest `out` of all layers.

    Initialization: A and B Kaiming-uniform (bounds sqrt(6 / largest in) and sqrt(6 / r)), d = 0.1, b = 0, so
    W' = W.

    Settings: r = `rank_factor` * rank. A rank of VeRA costs one value per layer, so VeRA needs a much higher
    rank than LoRA, while a study has one rank for all variants. At rank 8 the default factor of 32 gives 256,
    PEFT's default.

    VeRA needs larger learning rates than LoRA.
    """

    paper = "Kopiczko et al., arXiv 2310.11454"
    year = 2023
    deviations = """A lane draws A and B from its own seed, while PEFT has one `projection_prng_key` for all.
    A and B are part of the checkpoint and of the export."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    numerics = 2
    uses_alpha = False
    typical_lr_scale = 10.0
    hyperparameters = {"rank_factor": api.Int(32, help="r divided by the rank of the settings")}
    peft = api.PeftMethod(
        "VERA",
        {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        {"A": "vera_A", "B": "vera_B"},
        alpha=None,
        dropout="vera_dropout",
        constants={"save_projection": True, "bias": "none"},
    )

    def largest_rank(self, layer: api.FrozenLayer) -> int | None:
        return None

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        b = layer.zeros(layer.shape[0])
        return api.InitialTensors({"d": b.new_full((self.shared_rank(layer.settings),), 0.1), "b": b})

    def layer_group(self, layer_name: str) -> str:
        return "vera"

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        rank = self.shared_rank(settings)
        out_features, in_features = largest_sides(layers)
        a = random.uniform("A", (rank, in_features), math.sqrt(6 / in_features))
        b = random.uniform("B", (out_features, rank), math.sqrt(6 / rank))
        return api.InitialTensors({}, {"A": a, "B": b})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = self.own_part(params["A"], params["B"], layer)
        return params["d"].unsqueeze(-1) * a, params["b"].unsqueeze(-1) * b

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        a, b = self.own_part(params["A"], params["B"], layer)
        prepared = {"A": a.mT, "B": b.mT, "d": params["d"].unsqueeze(1), "b": params["b"].unsqueeze(1)}
        return {name: tensor.to(layer.stored_weight.dtype) for name, tensor in prepared.items()}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        update = api.bmm(api.bmm(x, params["A"]) * params["d"], params["B"])
        return torch.addcmul(base, update, params["b"])

    to_peft = api.PeftFormat.to_peft

    def peft_layer_fields(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Any]:
        return {"r": len(params["d"])}

    def settings_from_peft(self, config: Mapping[str, Any]) -> api.VariantSettings:
        return replace(super().settings_from_peft(config), extra={"rank_factor": 1})
