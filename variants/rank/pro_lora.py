"""PRoLoRA: factors made of rotated copies of a smaller chunk."""

import torch
from torch import Tensor

from variants import api


class PRoLoRA(api.LowRank):
    """W' = W + s (B A + B_c A_c) with s = alpha / rank, where A_c and B_c consist of copies.

    A (unshared, in) and B (out, unshared) are LoRA's. A_c is [C, roll(C, -t), roll(C, -2 t), ...] with
    m = `in_copies` copies of one chunk C (rank - unshared, in / m), each rotated by t ranks more than the one
    before, t = max(1, (rank - unshared) // m). If m does not divide `in`, the chunk has the next larger size
    and the last columns are dropped. B_c (out, rank - unshared) is made in the same way from
    D (out / n, rank - unshared) with n = `out_copies`.

    Initialization: A and C from U(-1/sqrt(in), 1/sqrt(in)), B = D = 0, so W' = W. The bound does not
    depend on the size of the chunk (the paper's rectified initialization).

    Defaults: this project's; the authors' scripts take all three as arguments.

    Source: `modules/chunkwise_sharing_LoRA.py` of the authors' code (Forence1999/PRoLoRA).
    """

    paper = "Wang et al., arXiv 2402.16902"
    year = 2024
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "unshared": api.Int(1, minimum=0, help="ranks without copies; below the rank"),
        "in_copies": api.Int(2, help="number m of chunks of A"),
        "out_copies": api.Int(2, help="number n of chunks of B"),
    }

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["unshared"] >= settings.rank:
            raise api.UnsupportedError(
                f"unshared {settings['unshared']}: must be below the rank {settings.rank}"
            )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), unshared = layer.shape, layer.settings["unshared"]
        shared, columns = layer.settings.rank - unshared, -(-in_features // layer.settings["in_copies"])
        a = random.kaiming("A", (unshared, in_features))
        c = random.kaiming("C", (shared, columns), fan_in=in_features)
        d = a.new_zeros(-(-out_features // layer.settings["out_copies"]), shared)
        return api.InitialTensors({"A": a, "B": a.new_zeros(out_features, unshared), "C": c, "D": d})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        out_features, in_features = layer.shape
        a = _rotated_copies(params["C"], layer.settings["in_copies"])[..., :in_features]
        b = _rotated_copies(params["D"].mT, layer.settings["out_copies"])[..., :out_features].mT
        return torch.cat([a, params["A"]], dim=-2), torch.cat([b, params["B"]], dim=-1)


def _rotated_copies(chunk: Tensor, copies: int) -> Tensor:
    """Return copies of a chunk (..., ranks, columns) side by side, each rotated further along its ranks."""
    stride = max(1, chunk.shape[-2] // copies)
    return torch.cat([chunk.roll(-stride * copy, dims=-2) for copy in range(copies)], dim=-1)
