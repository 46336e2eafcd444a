"""LoRA-SB: LoRA-XS with the factors of a first full update."""

from torch import Tensor

from variants import api
from variants.initialization.lora_xs import LoRAXS
from variants.linalg import randomized_svd


class LoRASB(LoRAXS):
    """W' = W + B R A, of which only R (rank, rank) learns. There is no alpha: the authors set s to 1.

    Initialization: G is the mean gradient over `calibration_batches` batches. -`step_size` * sign(G), the
    first step of a sign optimizer on W, is U S V^T. With the `rank` largest triplets, B = U, A = V^T and
    R = diag(S). Nothing is subtracted from W: at step 0, W' is W after that step at rank `rank`.

    The defaults are the authors' for MetaMathQA: 17 batches (50 examples in batches of 3), and the learning
    rate divided by the number of warmup steps in such batches, 1e-4 / 333 = 3e-7. (For commonsense tasks they
    use 170 examples in batches of 10 and a `step_size` of 3e-6, for GLUE 2 examples.)

    Source: train_arithmetic.py and utils/gradient_utils.py of the authors' code.
    """

    paper = "Ponkshe et al., arXiv 2411.19557"
    deviations = """`step_size` does not follow from the learning rate here, so that all rates of a sweep
    start from the same calibration. The SVD is randomized with the authors' 10 iterations, but with rank + 10
    columns (theirs: rank) and not rounded to bfloat16. The survey's code takes the triplets of G and starts
    from W + s B diag(S) A, a step that increases the loss, unless its option `--lora-reset-weight` is given.
    """
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "calibration_batches": api.Int(17, help="number of batches of the mean gradient"),
        "step_size": api.Number(3e-7, above=0, help="size of the first step"),
    }
    calibration_statistic = api.CalibrationStatistic.MEAN_GRADIENT
    uses_alpha = False

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        rank = layer.settings.rank
        first_step = -layer.settings["step_size"] * matrix.sign()
        u, s, vh = randomized_svd(first_step, rank, iterations=10, seed=api.stable_seed(layer.name, rank))
        return {"A": vh, "R": s.diag(), "B": u}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        a, r, b = self.calibrated(layer, *"ARB")
        return api.InitialTensors({"R": r}, {"A": a, "B": b})
