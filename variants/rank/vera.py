"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): two random matrices for all layers; only vectors learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import (
    Batching,
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    Params,
    Variant,
    VariantSettings,
    VerifiedBy,
    batch_invariant_baddbmm,
    batch_invariant_bmm,
    int_setting,
    pad_rank_one,
    parameter_generator,
    uniform_init,
)


class VeRA(Variant):
    """W' = W + diag(b) B diag(d) A with trainable vectors b (out,) and d (r,). There is no alpha.

    A (r, in) and B (out, r) are slices of two frozen random matrices that all layers share and that fit the
    largest layer.

    Initialization: A and B Kaiming-uniform (bounds sqrt(6 / largest in) and sqrt(6 / r)), d = 0.1, b = 0, so
    W' = W.

    Parameters: r + out per layer.

    Settings: r = `rank_factor` * rank. A rank of VeRA costs one value per layer, so VeRA needs a much higher
    rank than LoRA, while a study has one rank for all variants. At rank 8 the default factor of 32 gives 256,
    PEFT's default.

    Deviation: a lane draws A and B from its own seed, while PEFT has one `projection_prng_key` for all. A and
    B are part of the checkpoint and of the export.

    VeRA needs larger learning rates than LoRA.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    axis: ClassVar[str] = "rank"
    paper: ClassVar[str] = "2310.11454"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.REFERENCE_IMPLEMENTATION
    batching: ClassVar[Batching] = Batching.BATCHED
    is_rank_limited_by_layer: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False
    extra_defaults: ClassVar[ExtraSettings] = {"rank_factor": 32}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        int_setting(settings, "rank_factor")
        return settings

    def scaling(self, settings: VariantSettings) -> float:
        return 1.0

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        b = torch.zeros(layer.weight.shape[0], dtype=layer.dtype, device=layer.weight.device)
        return InitialTensors({"d": b.new_full((_vera_rank(settings),), 0.1), "b": b})

    def layer_group(self, layer_name: str) -> str | None:
        return "vera"

    def init_layer_group(
        self, layers: Mapping[str, FrozenLayer], settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        rank, like = _vera_rank(settings), next(iter(layers.values()))
        out_features, in_features = (
            max(layer.weight.shape[side] for layer in layers.values()) for side in (0, 1)
        )
        a = uniform_init(
            (rank, in_features), math.sqrt(6 / in_features), like, parameter_generator(generator, "A")
        )
        b = uniform_init((out_features, rank), math.sqrt(6 / rank), like, parameter_generator(generator, "B"))
        return InitialTensors({}, {"A": a, "B": b})

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        out_features, in_features = layer.weight.shape
        gains = params["b"].unsqueeze(2) * params["d"].unsqueeze(1)
        a, b = pad_rank_one(params["A"][..., :in_features], gains * params["B"][:, :out_features])
        return {"A": a, "B": b}

    def forward(
        self, x: Tensor, base_output: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor
    ) -> Tensor:
        a, b = params["A"].to(x.dtype), params["B"].to(x.dtype)
        return batch_invariant_baddbmm(
            base_output, batch_invariant_bmm(x, a.transpose(1, 2)), b.transpose(1, 2)
        )

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        one = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        prepared = self.prepare(one, layer, torch.ones(()))
        return (prepared["B"] @ prepared["A"])[0]

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        return _vera_rank(settings) + out_features

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor] | None:
        return {"vera_lambda_b": params["b"], "vera_lambda_d": params["d"]}

    def layer_group_to_peft(self, params: Params) -> dict[str, Tensor]:
        return {"vera_A": params["A"], "vera_B": params["B"]}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": _vera_rank(settings),
            "vera_dropout": settings.dropout,
            "save_projection": True,
            "bias": "none",
        }

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings | None:
        if config.get("peft_type") != "VERA":
            return None
        return VariantSettings(config["r"], None, float(config.get("vera_dropout", 0.0)), {"rank_factor": 1})

    def init_from_peft(
        self, tensors: Mapping[str, Tensor], layer: FrozenLayer, settings: VariantSettings
    ) -> InitialTensors:
        return InitialTensors({"d": tensors["vera_lambda_d"], "b": tensors["vera_lambda_b"]})

    def init_layer_group_from_peft(self, tensors: Mapping[str, Tensor]) -> InitialTensors:
        return InitialTensors({}, {"A": tensors["vera_A"], "B": tensors["vera_B"]})


def _vera_rank(settings: VariantSettings) -> int:
    return settings.rank * int(settings.extra["rank_factor"])
