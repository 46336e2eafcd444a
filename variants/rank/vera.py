"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): all layers share two random matrices; only vectors learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import (
    Checked,
    Extra,
    Kind,
    Layer,
    Params,
    Settings,
    Start,
    Variant,
    baddbmm,
    bmm,
    stream,
    uniform,
    whole_number,
    widened,
)


class VeRA(Variant):
    """W' = W + diag(b) B diag(d) A, with A (r, in) and B (out, r) cut out of two frozen random matrices that
    all layers share, as large as the largest layer wants. There is no alpha.

    Start: A, B Kaiming-uniform (bounds sqrt(6 / largest in) and sqrt(6 / r)), d = 0.1, b = 0, so W' = W.
    Parameters: r + out a layer.

    r = `rank_factor` * rank: a rank of VeRA costs one number a layer, so that it wants many more than LoRA,
    while a study has one rank for all variants; at rank 8, a factor of 32 gives 256, PEFT's default.
    A lane draws its A and B from its own seed, where PEFT has one `projection_prng_key` for all; they travel
    in the checkpoint and in the export. It wants larger learning rates than LoRA.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    axis: ClassVar[str] = "rank"
    paper: ClassVar[str] = "2310.11454"
    checked: ClassVar[Checked] = Checked.ORACLE
    kind: ClassVar[Kind] = Kind.STACKED
    rank_limited: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False
    extra: ClassVar[Extra] = {"rank_factor": 32}

    def checked_settings(self, settings: Settings) -> Settings:
        settings = super().checked_settings(settings)
        whole_number(settings, "rank_factor")
        return settings

    def scaling(self, settings: Settings) -> float:
        return 1.0

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        b = torch.zeros(layer.weight.shape[0], dtype=layer.dtype, device=layer.weight.device)
        return Start({"d": b.new_full((_rank(settings),), 0.1), "b": b})

    def group(self, layer: str) -> str | None:
        return "vera"

    def start_group(
        self, layers: Mapping[str, Layer], settings: Settings, generator: torch.Generator
    ) -> Start:
        rank, like = _rank(settings), next(iter(layers.values()))
        out_features, in_features = (
            max(layer.weight.shape[side] for layer in layers.values()) for side in (0, 1)
        )
        a = uniform((rank, in_features), math.sqrt(6 / in_features), like, stream(generator, "A"))
        b = uniform((out_features, rank), math.sqrt(6 / rank), like, stream(generator, "B"))
        return Start({}, {"A": a, "B": b})

    def prepare(self, params: Params, layer: Layer, scaling: Tensor) -> Params:
        out_features, in_features = layer.weight.shape
        gains = params["b"].unsqueeze(2) * params["d"].unsqueeze(1)
        a, b = widened(params["A"][..., :in_features], gains * params["B"][:, :out_features])
        return {"A": a, "B": b}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: Layer, scaling: Tensor) -> Tensor:
        a, b = params["A"].to(x.dtype), params["B"].to(x.dtype)
        return baddbmm(base, bmm(x, a.transpose(1, 2)), b.transpose(1, 2))

    def delta(self, params: Params, layer: Layer, scaling: float) -> Tensor:
        one = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        made = self.prepare(one, layer, torch.ones(()))
        return (made["B"] @ made["A"])[0]

    def parameter_count(self, out_features: int, in_features: int, settings: Settings) -> int:
        return _rank(settings) + out_features

    def to_peft(self, params: Params, settings: Settings) -> dict[str, Tensor] | None:
        return {"vera_lambda_b": params["b"], "vera_lambda_d": params["d"]}

    def group_to_peft(self, params: Params) -> dict[str, Tensor]:
        return {"vera_A": params["A"], "vera_B": params["B"]}

    def peft_config(self, settings: Settings) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": _rank(settings),
            "vera_dropout": settings.dropout,
            "save_projection": True,
            "bias": "none",
        }

    def from_peft(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("peft_type") != "VERA":
            return None
        return Settings(config["r"], None, float(config.get("vera_dropout", 0.0)), {"rank_factor": 1})

    def start_from_peft(self, tensors: Mapping[str, Tensor], layer: Layer, settings: Settings) -> Start:
        return Start({"d": tensors["vera_lambda_d"], "b": tensors["vera_lambda_b"]})

    def group_from_peft(self, tensors: Mapping[str, Tensor]) -> Start:
        return Start({}, {"A": tensors["vera_A"], "B": tensors["vera_B"]})


def _rank(settings: Settings) -> int:
    return settings.rank * int(settings.extra["rank_factor"])
