"""MELoRA: one small LoRA for each block of inputs and outputs."""

import torch
from torch import Tensor

from variants import api


class MELoRA(api.LowRank):
    """W' = W + s diag(B_1 A_1, ..., B_n A_n): part i of the inputs changes part i of the outputs.

    A is (n, rank, in / n) and B is (n, out / n, rank), so the update has the rank n * rank and as many values
    as a LoRA of rank `rank`. s = alpha / rank, as in each of the small LoRAs.

    Initialization: A from U(-b, b) with b = sqrt(n / in), which is Kaiming-uniform for in / n inputs; B = 0,
    so W' = W.

    Default: the survey's 2 blocks, so rank 8 gives the overall rank 16.

    Source: `tuners/melora.py` of the authors' code (ChasonShi/MELoRA).
    """

    paper = "Ren et al., arXiv 2402.17263"
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"blocks": api.Int(2, divides=("in", "out"), help="number n of small LoRAs")}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), n = layer.shape, layer.settings["blocks"]
        a = random.kaiming("A", (n, layer.settings.rank, in_features // n))
        return api.InitialTensors({"A": a, "B": a.new_zeros(n, out_features // n, layer.settings.rank)})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        return _block_diagonal(params["A"]), _block_diagonal(params["B"])


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix (..., n p, n q) with the blocks (..., n, p, q) on its diagonal."""
    n = blocks.shape[-3]
    places = torch.eye(n, dtype=blocks.dtype, device=blocks.device).view(n, 1, n, 1)
    return (blocks.unsqueeze(-2) * places).flatten(-2).flatten(-3, -2)
