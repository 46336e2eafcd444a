"""LoRA-GA: LoRA whose first step approximates full fine-tuning's."""

import math

from torch import Tensor

from variants import api
from variants.linalg import fix_signs, randomized_svd
from variants.low_rank import LowRank, start_from


class LoRAGA(api.Calibrated, LowRank):
    """W' = W + s (B A - B0 A0) with s = alpha / sqrt(rank).

    s is that of the authors' reproduce/run_exp.py with `use_rslora`, which its Readme requires.

    Initialization: G = U S V^T is the mean gradient over `calibration_batches` batches. A = A0 = c V[:, :r]^T
    and B = B0 = c U[:, r:2r] with c = out^(1/4) / sqrt(`gamma`) (the authors' scale "stable" and direction
    "ArB2r"), so W' = W. Each rank takes two singular vectors, so the rank is at most half the smaller side of
    the layer.

    The defaults are those of the authors' PEFT fork, whose batches have 2 rows (here: the rows of a
    micro-batch). Their conf/init/gradient.yaml has 8 batches of 1 row; the Readme's example has `gamma` 64.

    PEFT's `lora_ga` is another method, so it is no reference: it multiplies B0 by the singular values and by
    c, does not scale A0, and divides by `rank` by default.
    """

    title = "LoRA-GA"
    paper = "Wang et al., arXiv 2407.05000"
    year = 2024
    deviations = """
    - The paper writes W - s B0 A0 into the weight. Here A0 and B0 are frozen tensors beside it. Unlike in
      PiSSA, dropout applies to B0 A0 as it does to B A, so that W' = W also with dropout. (In the survey
      dropout broke LoRA-GA.)
    - G is the gradient without the model's own dropout (the authors': with it).
    - The SVD is randomized with 4 power iterations and 4 r columns as in the authors' code, but with at least
      2 r + 10 columns and its own noise.
    - An SVD determines a pair (u, v) up to a common sign. A0 and B0 come from different pairs, so the signs
      affect training. The entry of v with the largest absolute value is made positive; in the authors' code
      the sign depends on the linear algebra library."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    calibration_statistic = api.CalibrationStatistic.MEAN_GRADIENT
    frozen_update_buffers = frozenset()
    hyperparameters = {
        "calibration_batches": api.Int(64, help="batches that the mean gradient is taken over"),
        "gamma": api.Number(16.0, above=0, help="a larger value makes A and B smaller"),
    }

    scaling = LowRank.rank_stabilized

    def largest_rank(self, layer: api.FrozenLayer) -> int:
        return min(layer.shape) // 2

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        rank = layer.settings.rank
        columns, seed = max(4 * rank, 2 * rank + 10), api.stable_seed(layer.name, rank)
        u, _, vh = randomized_svd(matrix, 2 * rank, iterations=4, seed=seed, columns=columns)
        u, vh = fix_signs(u, vh)
        c = matrix.shape[0] ** 0.25 / math.sqrt(float(layer.settings["gamma"]))
        return {"A0": c * vh[:rank], "B0": c * u[:, rank:]}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return start_from(*self.calibrated(layer, "A0", "B0"))
