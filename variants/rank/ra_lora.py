"""RaLoRA: block-diagonal LoRA by the gradient's rank."""

import math

import torch
from torch import Tensor

from variants import api


class RaLoRA(api.Calibrated, api.LowRank):
    """W' = W + s diag(B_1 A_1, ..., B_n A_n) with s = alpha / rank: n diagonal blocks of equal size.

    A_i is (rank, in / n) and B_i (out / n, rank). They are stored side by side as A (rank, in) and
    B (out, rank), so that a layer has as many parameters as in LoRA and n times its rank.

    n is the largest power of two, up to 2^`max_power`, for which n * rank is not above the effective rank of
    the mean gradient over `calibration_batches` batches. (It is 1 if there is none, and it must divide both
    sides of the layer.) The effective rank is exp(H), where H is the entropy of the singular values divided
    by their sum.

    Initialization: A_i from U(-sqrt(n / in), sqrt(n / in)), which is LoRA's for a layer with in / n inputs;
    B = 0, so W' = W.

    Source: the authors' code (`ralora.py`) with equal ranks; RaLoRA-Pro allocates ranks as GoRA besides.
    """

    paper = "Ye et al., ICLR 2026, OpenReview kObvnQ6pUx"
    year = 2026
    deviations = """The authors' code has no default of `max_power`, and raises an error if n does not
    divide a side."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    calibration_statistic = api.CalibrationStatistic.MEAN_GRADIENT
    hyperparameters = {
        "calibration_batches": api.Int(32, help="number of batches of the mean gradient"),
        "max_power": api.Int(4, help="the largest number of blocks is 2 to this power"),
    }

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        values = torch.linalg.svdvals(matrix)
        shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return {"effective_rank": torch.special.entr(shares).sum().exp().unsqueeze(0)}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = random.lora()
        rank = self.calibrated(layer, "effective_rank")[0]
        ratio = 1.0 if rank.is_meta else max(1.0, float(rank) / layer.settings.rank)
        power = min(math.floor(math.log2(ratio)), layer.settings["max_power"])
        blocks = math.gcd(2**power, *layer.shape)
        a = initial.trainable["A"].mul_(math.sqrt(blocks))
        return api.InitialTensors(initial.trainable, {"blocks": a.new_tensor([blocks])})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (..., N * rank, in) and B (..., out, N * rank), zero outside blocks; N = 2^max_power."""
        in_out, in_in = (
            _block_membership(params["blocks"], size, 2 ** layer.settings["max_power"])
            for size in layer.shape
        )
        a = (params["A"].unsqueeze(-3) * in_in.unsqueeze(-2)).flatten(-3, -2)
        b = (params["B"].unsqueeze(-2) * in_out.transpose(-1, -2).unsqueeze(-1)).flatten(-2)
        return a, b


def _block_membership(blocks: Tensor, size: int, most: int) -> Tensor:
    """Return (..., most, size): 1.0 where a position of a side lies in a block, and 0.0 elsewhere.

    Args:
        blocks: The number of blocks of each lane, (..., 1), which divides `size`.
        size: The length of the side.
        most: The number of rows of the result.
    """
    positions = torch.arange(size, device=blocks.device)
    block = torch.div(positions * blocks, size, rounding_mode="floor")
    return (block.unsqueeze(-2) == torch.arange(most, device=blocks.device).unsqueeze(-1)).to(blocks)
