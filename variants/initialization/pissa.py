"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA from the largest singular triplets of the weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from variants.base import (
    CalibrationStatistic,
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    Params,
    UnsupportedError,
    VariantSettings,
    stable_seed,
)
from variants.baseline.lora import LoRA


class PiSSA(LoRA):
    """W' = W + s (B A - B0 A0) with s = alpha / rank; W - s B0 A0 is the paper's residual weight.

    Initialization: with the `rank` largest triplets of W = U S V^T, B = B0 = U sqrt(S / s) and
    A = A0 = sqrt(S / s) V^T, so W' = W. It involves no noise: seeds differ only in their data order.

    Parameters: rank * (in + out) per layer.

    The paper writes the residual into W. Here A0 and B0 are frozen tensors beside it, which is exact in
    bfloat16 and needs one base model for all lanes. Dropout does not apply to the residual.

    The singular triplets are computed once for each base model, rank and `svd`, and kept in the store.
    Without a store they are computed once for each model to which the variant is attached.

    Settings: `svd` is "exact" or the number of power iterations of a randomized SVD (the paper recommends 16
    for speed).
    """

    name: ClassVar[str] = "pissa"
    calibration_statistic: ClassVar[CalibrationStatistic] = CalibrationStatistic.WEIGHT
    extra_defaults: ClassVar[ExtraSettings] = {"svd": "exact"}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        svd = str(settings.extra["svd"])
        if svd != "exact" and not (svd.isdigit() and int(svd) > 0):
            raise UnsupportedError(
                f"svd {svd!r}: must be 'exact' or a number of power iterations, such as 16"
            )
        return settings

    def init(self, layer: FrozenLayer, settings: VariantSettings, generator: Generator) -> InitialTensors:
        triplets = layer.calibration or self._singular_triplets(layer, settings)
        u, s, vh = (triplets[name].to(layer.device, layer.dtype) for name in ("U", "S", "Vh"))
        root = (s / self.scaling(settings)).sqrt()
        b, a = u * root, root.unsqueeze(1) * vh
        return InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor, settings: VariantSettings) -> Params:
        """Return U (out, rank), S (rank,) and Vh (rank, in) of the weight."""
        rank, svd = settings.rank, str(settings.extra["svd"])
        u, s, vh = (
            torch.linalg.svd(matrix, full_matrices=False)
            if svd == "exact"
            else randomized_svd(matrix, rank, int(svd), stable_seed(layer.name, rank))
        )
        return {"U": u[:, :rank].contiguous(), "S": s[:rank].contiguous(), "Vh": vh[:rank].contiguous()}

    def export_rank(self, settings: VariantSettings) -> int:
        return 2 * settings.rank

    def _singular_triplets(self, layer: FrozenLayer, settings: VariantSettings) -> Params:
        """Return the triplets of a layer, computed once for all lanes."""
        key = f"svd {settings.extra['svd']} {settings.rank}"
        if key not in layer.cache:
            layer.cache[key] = self.reduce_calibration(layer, layer.weight.to(layer.dtype), settings)
        return layer.cache[key]


def randomized_svd(weight: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V^T of the largest triplets by a randomized SVD.

    The result has up to ten triplets more than `rank`.

    Halko, Martinsson and Tropp (2011, arXiv 0909.4061), algorithms 4.4 and 5.1. The global random state of
    torch is not used.

    Args:
        weight: (out, in).
        rank: The number of triplets needed.
        iterations: The number of power iterations.
        seed: The seed of the random projection.
    """
    columns = min(rank + 10, *weight.shape)
    noise = torch.randn(weight.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(weight @ noise.to(weight))[0]
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return q @ u, s, vh
