"""OLoRA: LoRA from the QR decomposition of the weight."""

import torch
from torch import Tensor

from variants import api
from variants.low_rank import LowRank, start_from


class OLoRA(api.Calibrated, LowRank):
    """W' = W + s (B A - B0 A0) with s = alpha / rank.

    Initialization: W = Q R; B = B0 = the first `rank` columns of Q, A = A0 = the first `rank` rows of R, so
    W' = W. s B0 A0 is subtracted, as in the paper's algorithm.

    The decomposition is computed once for each base model and rank, and does not depend on a lane's seed.

    PEFT is the reference for layers of type Linear.
    """

    paper = "Büyükakyüz, arXiv 2406.01775"
    deviations = """PEFT decomposes the stored weight of a Conv1D layer, W^T, whose factors fit square layers
    only."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    calibration_statistic = api.CalibrationStatistic.WEIGHT

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        q, r = torch.linalg.qr(matrix)
        return {"A0": r[: layer.settings.rank].contiguous(), "B0": q[:, : layer.settings.rank].contiguous()}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return start_from(*self.calibrated(layer, "A0", "B0"))
