"""EVA (Paischer et al. 2024, arXiv 2410.07170): LoRA that starts from the directions in which a layer's
inputs vary most, with more ranks where they explain more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    Evidence,
    Extra,
    Layer,
    Params,
    Settings,
    Start,
    Unsupported,
    number,
    whole_number,
)
from variants.baseline.lora import LoRA
from variants.initialization.pissa import randomised_svd


class EVA(LoRA):
    """W' = W + s B A, s = alpha / rank whatever ranks a layer was given (PEFT's `adjust_scaling_factors`).

    Start: A = the inputs' first principal directions, B = 0, so W' = W. Of the `rho` * rank first directions
    of every layer, the layers * rank that explain the largest share of their own layer's variance are used; a
    layer may get none. All layers are padded to `rho` * rank, with a frozen mask over the ranks that are not
    in use. Parameters: ranks in use * (in + out) a layer.

    Principal directions are the right singular vectors of the inputs minus their mean, as in the authors'
    code and PEFT (both use an incremental PCA). Deviations from them: the covariance is that of all of
    `calibration_batches` batches, decomposed once, where theirs is updated batch by batch, truncated each
    time, until the directions stand still (`tau`); every position that is no padding counts, also the
    prompt's, which PEFT leaves out by default.
    """

    name: ClassVar[str] = "eva"
    title: ClassVar[str] = "EVA"
    axis: ClassVar[str] = "initialization"
    paper: ClassVar[str] = "2410.07170"
    evidence: ClassVar[Evidence] = Evidence.INPUTS
    extra: ClassVar[Extra] = {"calibration_batches": 64, "rho": 2.0}

    def checked_settings(self, settings: Settings) -> Settings:
        settings = super().checked_settings(settings)
        whole_number(settings, "calibration_batches")
        rho = settings.extra["rho"]
        if isinstance(rho, (str, bool)) or not math.isfinite(rho) or rho < 1:
            raise Unsupported(f"rho {rho!r}: must be a finite number of at least 1; the paper's is 2")
        return settings

    def distill(self, layer: Layer, matrix: Tensor, settings: Settings) -> dict[str, Tensor]:
        columns = min(_room(settings), len(matrix))
        # One seed for all layers, so that those that share their inputs tie exactly: the first comes first.
        _, variance, directions = randomised_svd(matrix, columns, iterations=4, seed=number(columns))
        total = matrix.trace().clamp_min(torch.finfo(matrix.dtype).tiny)
        return {"directions": directions[:columns], "shares": variance[:columns] / total}

    def start_all(
        self,
        layers: Mapping[str, Layer],
        settings: Settings,
        generator: Callable[[str], torch.Generator],
    ) -> dict[str, Start]:
        shares = [layer.evidence["shares"] for layer in layers.values()]
        owner = torch.repeat_interleave(torch.tensor([len(each) for each in shares]))
        largest = torch.cat(shares).cpu().argsort(descending=True, stable=True)
        used = owner[largest[: len(layers) * settings.rank]].bincount(minlength=len(layers))
        return {
            name: _started(layer, int(rank), _room(settings))
            for (name, layer), rank in zip(layers.items(), used, strict=True)
        }

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        return params["A"], params["B"] * params["mask"].unsqueeze(-2)

    def rank_in_use(self, params: Params, settings: Settings) -> int:
        return int(params["mask"].sum())

    def export_rank(self, settings: Settings) -> int:
        """The masked ranks go along as zeros."""
        return _room(settings)


def _room(settings: Settings) -> int:
    """Ranks that a layer can get."""
    return round(settings.rank * float(settings.extra["rho"]))


def _started(layer: Layer, rank: int, room: int) -> Start:
    out_features, in_features = layer.weight.shape
    a = torch.zeros(room, in_features, dtype=layer.dtype, device=layer.weight.device)
    a[:rank] = layer.evidence["directions"][:rank]
    mask = (torch.arange(room) < rank).to(a)
    return Start({"A": a, "B": a.new_zeros(out_features, room)}, {"mask": mask})
