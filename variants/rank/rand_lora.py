"""RandLoRA: full rank from random bases; scales learn."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variants import api
from variants.hooks import largest_sides


class RandLoRA(api.SharedTensors, api.LowRank):
    """W' = W + D, or W' = W + D^T if out < in, with D = s / sqrt(n) sum_i B_i diag(l_i) A diag(g_i).

    With p = min(out, in) and q = max(out, in), A (r, p) and the n matrices B_i (q, r) are frozen and random,
    slices of two tensors that all layers share; l_i (r,) and g_i (p,) are trained. r = `rank_factor` * rank,
    n = ceil(min(p, base_limit) / r), s = alpha / rank. As in PEFT, the columns of the B_i and the rows of A
    are paired otherwise than in this sum: with i, j and k = i r + j counted from 0, column j of B_i meets row
    m = k // n of A, multiplied by entry m of l_h and by g_h, where h = k % n.

    Initialization: A and B uniform with a standard deviation of 1, all values of g (n, p) 1 / max(n, p), and
    l (r, n) = 0, so W' = W.

    Defaults: at rank 8, `rank_factor` 4 gives the basis rank 32 of the survey, which calls `base_limit` U
    and sets it to 1024. Without a limit (`base_limit` at least p) the update can have full rank.

    Source: `tuners/randlora/` of the authors' code (PaulAlbert31/RandLoRA) and of PEFT.
    """

    paper = "Albert et al., arXiv 2502.00987"
    year = 2025
    deviations = """PEFT has no `base_limit`, and no 1 / sqrt(n), which is the authors' (`normalized`). A lane
    draws A and B from its own seed and keeps them in its checkpoint; PEFT has one `projection_prng_key`. The
    survey's code draws l from N(0, 1), so it does not start at W, and has g = 1 / q."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "rank_factor": api.Int(4, help="rank r of each basis, divided by the rank"),
        "base_limit": api.Int(
            1024, help="the n bases together have at least this rank, or that of the layer"
        ),
        "normalized": api.Flag(True, help="divide by the root of the number of bases (PEFT does not)"),
    }
    peft = api.PeftMethod(
        "RANDLORA",
        {"l": "randlora_lambda", "g": "randlora_gamma"},
        group_names={"A": "randlora_A", "B": "randlora_B"},
        alpha="randlora_alpha",
        dropout="randlora_dropout",
        constants={"save_projection": True, "bias": "none"},
    )

    def largest_rank(self, layer: api.FrozenLayer) -> int | None:
        return None

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        n, r = self._basis_count(layer.shape, layer.settings), self.shared_rank(layer.settings)
        shape = n, min(layer.shape)
        g = torch.full(shape, 1 / max(shape), dtype=layer.dtype, device=layer.device)
        return api.InitialTensors({"l": g.new_zeros(r, n), "g": g})

    def layer_group(self, layer_name: str) -> str:
        return "rand_lora"

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        sides, r = largest_sides(layers), self.shared_rank(settings)
        shapes = {"A": (r, 1, min(sides)), "B": (max(sides), self._basis_count(sides, settings), r)}
        bases = {name: random.uniform(name, shape, 1.0) for name, shape in shapes.items()}
        return api.InitialTensors({}, {name: basis / basis.std() for name, basis in bases.items()})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        n, p, q = self._basis_count(layer.shape, layer.settings), min(layer.shape), max(layer.shape)
        scales = params["l"].unsqueeze(-1) * params["g"].unsqueeze(-3)  # (..., r, n, p)
        if layer.settings["normalized"]:
            scales = scales / math.sqrt(n)
        # As in PEFT, column k of B in the order (n, r) meets row k of A in the order (r, n).
        a = (params["A"][..., :p] * scales).flatten(-3, -2)
        b = params["B"][..., :q, :n, :].flatten(-2)
        return (a, b) if layer.shape[1] == p else (b.mT, a.mT)

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        n, p = params["g"].shape
        if n * self.shared_rank(layer.settings) < p:
            raise api.UnsupportedError(
                f"rand_lora with base_limit {layer.settings['base_limit']} cannot be exported: PEFT has {p}"
            )
        g = params["g"] / math.sqrt(n) if layer.settings["normalized"] else params["g"]
        return {"randlora_lambda": params["l"], "randlora_gamma": g}

    def peft_layer_fields(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Any]:
        rank = self.shared_rank(layer.settings)
        return {"r": rank, "randlora_alpha": self.scaling(layer.settings) * rank}

    def settings_from_peft(self, config: Mapping[str, Any]) -> api.VariantSettings:
        extra = {"rank_factor": 1, "base_limit": 1 << 30, "normalized": False}
        return replace(super().settings_from_peft(config), extra=extra)

    def _basis_count(self, shape: tuple[int, int], settings: api.VariantSettings) -> int:
        """Return n, the number of random bases, for a layer of this shape."""
        return math.ceil(min(*shape, settings["base_limit"]) / self.shared_rank(settings))
