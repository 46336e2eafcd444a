"""VB-LoRA: factors put together from a few vectors of one shared bank."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from variants import api

DEFAULT_LENGTH = 256
"""PEFT's length of a vector."""


class VBLoRA(api.InitTogether, api.SharedTensors, api.RateScales, api.LowRank):
    """W' = W + B A, where each piece of `vector_length` values in a row of A or a column of B is a mixture.

    A mixture is the sum of the `top_k` vectors with the largest logits, weighted by the softmax of these
    logits. The vectors come from a bank (vectors, vector_length) that all layers share. The logits of a layer
    are PA (rank, in / vector_length, vectors) and PB (out / vector_length, rank, vectors). There is no alpha.

    Initialization: bank from U(-0.02, 0.02), logits from N(0, 0.1^2), so W' is close to W and not equal.

    Defaults: PEFT's, and the authors' ratio 10 of the learning rate of the logits to that of the bank. If 256
    does not divide both sides of all layers, the default `vector_length` is its largest divisor that does.

    Source: `tuners/vblora/` of PEFT, and `NLU/` of the authors' code (leo-yangli/VB-LoRA).
    """

    title = "VB-LoRA"
    paper = "Li et al., arXiv 2405.15179"
    year = 2024
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "vectors": api.Int(256, help="number of vectors in the bank"),
        "vector_length": api.Int(
            0, minimum=0, help="values of a vector; divides all sides; 0: 256 if possible"
        ),
        "top_k": api.Int(2, help="number of vectors in a mixture"),
        "logit_lr_ratio": api.Number(
            10.0, above=0, help="learning rate of the logits relative to the bank's"
        ),
    }
    uses_alpha = False
    start = api.Start.OTHER
    typical_lr_scale = 10.0
    peft = api.PeftMethod(
        "VBLORA",
        {"PA": "vblora_logits_A", "PB": "vblora_logits_B"},
        group_names={"bank": "vblora_vector_bank"},
        alpha=None,
        dropout="vblora_dropout",
        fields={"vectors": "num_vectors", "vector_length": "vector_length", "top_k": "topk"},
    )

    def check_settings(self, settings: api.VariantSettings) -> None:
        top_k, vectors = settings["top_k"], settings["vectors"]
        if top_k > vectors:
            raise api.UnsupportedError(f"top_k {top_k}: must be at most vectors {vectors}")

    def check_layer(self, layer: api.FrozenLayer) -> None:
        out_features, in_features = layer.shape
        if math.gcd(out_features, in_features) % (layer.settings["vector_length"] or 1):
            raise api.UnsupportedError(
                f"{layer.name}: vector_length {layer.settings['vector_length']} does not divide "
                f"{out_features} x {in_features}"
            )

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        initial, length = {}, _vector_length(layers)
        for name, layer in layers.items():
            (out_features, in_features), rank = layer.shape, layer.settings.rank
            shapes = {"PA": (rank, in_features // length), "PB": (out_features // length, rank)}
            vectors, random = layer.settings["vectors"], random_of(name)
            initial[name] = api.InitialTensors(
                {key: random.normal(key, (*shape, vectors), 0.1) for key, shape in shapes.items()}
            )
        return initial

    def layer_group(self, layer_name: str) -> str:
        return "vb_lora"

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        shape = settings["vectors"], _vector_length(layers)
        return api.InitialTensors({"bank": random.uniform("bank", shape, 0.02)})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = (_mixtures(params[name], params["bank"], layer.settings["top_k"]) for name in ("PA", "PB"))
        return a.flatten(-2), b.transpose(-1, -2).flatten(-3, -2)

    def peft_layer_fields(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Any]:
        return {"vector_length": params["bank"].shape[1]}

    def init_group_from_peft(self, tensors: api.Params, settings: api.VariantSettings) -> api.InitialTensors:
        return api.InitialTensors({"bank": tensors["vblora_vector_bank"]})

    def parameter_lr_scale(self, parameter: str, settings: api.VariantSettings) -> float:
        return 1.0 if parameter == "bank" else settings["logit_lr_ratio"]


def _vector_length(layers: api.Layers) -> int:
    sides = itertools.chain(*(layer.shape for layer in layers.values()))
    return int(api.shared_settings(layers)["vector_length"]) or math.gcd(DEFAULT_LENGTH, *sides)


def _mixtures(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return (..., n, m, length) from logits (..., n, m, vectors) and a bank (..., vectors, length)."""
    top = logits.topk(k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
    return (weights.flatten(-3, -2) @ bank).unflatten(-2, logits.shape[-3:-1])
