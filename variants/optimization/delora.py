"""DeLoRA: directions of unit length learn apart from their strength."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from variants import api

NORM_MINIMUM = 1e-4
"""Smallest norm of a row of A or a column of B by which PEFT divides."""


class DeLoRA(api.LowRank):
    """W' = W + (lambda / rank) (B N A - B0 N0 A0) diag(w), where N = diag(1 / (|b_i| |a_i|)).

    a_i is a row of A, b_i a column of B, and w the norms of W's columns (one for each input). A, B and the
    number lambda learn. The norm of the change is at most 2 |lambda| max(w), whatever A and B are.

    Initialization: A and B Kaiming-uniform (bounds 1 / sqrt(in) and 1 / sqrt(rank)) with frozen copies A0 and
    B0, so W' = W. With `initial` "zero" there are no copies and B is zero, as in PEFT.

    The defaults, lambda = 8 and Kaiming, are the survey's. PEFT's lambda is 15. The authors' GLUE
    script uses 4 or 12, and for two of seven tasks a learning rate of lambda three times that of A and B.

    Norms below 1e-4 count as 1e-4, as in PEFT, which the zero start needs. Dropout applies to both products.
    As in the authors' code, lambda multiplies both; in the survey's code the product of A0 and B0
    keeps the initial lambda. DeLoRA needs larger learning rates than LoRA.

    Source: `get_ABCD` in the authors' delora.py.
    """

    paper = "Bini et al., arXiv 2503.18225"
    year = 2025
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "lambda": api.Number(8.0, above=0, help="initial strength"),
        "initial": api.Choice("kaiming", ("kaiming", "zero"), help="initial B"),
    }
    uses_alpha = False
    typical_lr_scale = 10.0
    frozen_update_buffers = frozenset()
    peft = api.PeftMethod(
        "DELORA",
        {"A": "delora_A", "B": "delora_B", "lambda": "delora_lambda"},
        alpha=None,
        dropout="module_dropout",
        fields={"lambda": "delora_lambda"},
        constants={"bias": "none"},
        adapts_conv1d=False,
    )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        trainable = random.lora().trainable
        trainable["lambda"] = trainable["A"].new_full((1,), layer.settings["lambda"])
        if layer.settings["initial"] == "zero":
            return api.InitialTensors(trainable)
        trainable["B"] = random.kaiming("B", (layer.shape[0], layer.settings.rank))
        return api.InitialTensors(trainable, {"A0": trainable["A"], "B0": trainable["B"]})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        norms, strength = _column_norms(layer), params["lambda"] / layer.settings.rank
        scaled = {**params, "A": _scale_rows(params["A"], params["B"], strength) * norms}
        if "A0" in params:
            scaled["A0"] = _scale_rows(params["A0"], params["B0"], strength) * norms
        return super().factors(scaled, layer)

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        """Return A, B and lambda, or with frozen copies those of one DeLoRA of twice the rank and lambda."""
        if "A0" in params:
            a, b = torch.cat([params["A"], params["A0"]]), torch.cat([params["B"], -params["B0"]], dim=1)
            params = {"A": a, "B": b, "lambda": 2 * params["lambda"]}
        return api.PeftFormat.to_peft(self, params, layer)

    def peft_layer_fields(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Any]:
        return {"r": (2 if "A0" in params else 1) * layer.settings.rank}

    def settings_from_peft(self, config: Mapping[str, Any]) -> api.VariantSettings:
        settings = super().settings_from_peft(config)
        return replace(settings, extra={**settings.extra, "initial": "zero"})


def _scale_rows(a: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    """Return strength * N A for A (..., rank, in), B (..., out, rank) and a strength (..., 1)."""
    norms = a.norm(dim=-1).clamp_min(NORM_MINIMUM) * b.norm(dim=-2).clamp_min(NORM_MINIMUM)
    return a * (strength / norms).unsqueeze(-1)


def _column_norms(layer: api.FrozenLayer) -> Tensor:
    """Return the norm of each column of W, (in,)."""
    if "column norms" not in layer.cache:
        layer.cache["column norms"] = vector_norm(layer.weight, dim=0, dtype=layer.dtype)
    return layer.cache["column norms"]
