"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the weight's largest singular
triplets.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    UnsupportedError,
    VariantSettings,
    stable_seed,
)
from variants.baseline.lora import LoRA


class PiSSA(LoRA):
    """W' = W + s (B A - B0 A0), s = alpha / rank; W - s B0 A0 is the paper's residual weight.

    Start: with W = U S V^T and its `rank` largest triplets, B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T, and A,
    B begin as A0, B0, so W' = W. The paper writes the residual into W; here A0 and B0 stay beside it as
    frozen tensors, exact in bfloat16 and over one base for all lanes. Dropout does not apply to the residual.
    Parameters: rank * (in + out) a layer.

    `svd`: "exact", or the number of power iterations of a randomised one (the paper advises 16 for speed).
    There is no noise in the start: seeds differ in their data order only.
    """

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "PiSSA"
    axis: ClassVar[str] = "initialization"
    paper: ClassVar[str] = "2404.02948"
    extra_defaults: ClassVar[ExtraSettings] = {"svd": "exact"}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        svd = str(settings.extra["svd"])
        if svd != "exact" and not (svd.isdigit() and int(svd) > 0):
            raise UnsupportedError(
                f"svd {svd!r}: must be 'exact' or a number of power iterations, such as 16"
            )
        return settings

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        u, s, vh = _singular_triplets(layer, settings.rank, str(settings.extra["svd"]))
        root = (s / self.scaling(settings)).sqrt()
        b, a = u * root, root.unsqueeze(1) * vh
        return InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})

    def export_rank(self, settings: VariantSettings) -> int:
        return 2 * settings.rank


def _singular_triplets(layer: FrozenLayer, rank: int, svd: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), S (rank,), V^T (rank, in): the same for all lanes, so taken once a layer."""
    key = f"svd {svd} {rank}"
    if key not in layer.cache:
        weight = layer.weight.to(layer.dtype)
        u, s, vh = (
            torch.linalg.svd(weight, full_matrices=False)
            if svd == "exact"
            else randomized_svd(weight, rank, int(svd), stable_seed(layer.name, rank))
        )
        layer.cache[key] = u[:, :rank].contiguous(), s[:rank].contiguous(), vh[:rank].contiguous()
    return layer.cache[key]


def randomized_svd(weight: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the largest `rank` triplets and up to ten more: Halko, Martinsson and Tropp (2011, arXiv
    0909.4061), algorithms 4.4 and 5.1. Its own noise, so that torch's global state is left alone.
    """
    columns = min(rank + 10, *weight.shape)
    noise = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(weight @ noise.to(weight))[0]
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return q @ u, s, vh
