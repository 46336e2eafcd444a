"""CorDA: LoRA from the components of W that certain inputs use."""

import torch
from torch import Tensor

from variants import api
from variants.initialization.pissa import PiSSA


class CorDA(PiSSA):
    """W' = W + s (B A - B0 A0) with s = alpha / rank.

    Initialization: W C = U S V^T, where C is the mean of X^T X over the samples of `calibration_batches`
    batches. X (positions, in) is a sample's inputs without padding, divided by |m|, where m is the largest
    of them (not the one of largest absolute value).
    A = A0 = sqrt(S / s) V^T C^-1 and B = B0 = U sqrt(S / s), so W' = W. In the `mode` "instruction" they
    have the `rank` largest triplets, and the components of W that the inputs use most learn; in the mode
    "knowledge" the smallest, and these components are preserved. C gets 1 % of its mean diagonal added to
    its diagonal, or 2, 4, 8, ... % until its inverse is accurate.

    The defaults: 256 batches (the authors: 256 samples) and PEFT's mode.

    Source: cordalib/act_aware_utils.py and decomposition.py of the authors' code; PEFT's corda.py.
    """

    paper = "Yang et al., arXiv 2406.05223"
    year = 2024
    deviations = """In the mode "knowledge" the authors take C from samples of another task; here C is always
    the training data's."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "calibration_batches": api.Int(256, help="number of batches of the inputs' second moment"),
        "mode": api.Choice(
            "instruction", ("instruction", "knowledge"), help="largest or smallest components"
        ),
    }
    calibration_statistic = api.CalibrationStatistic.INPUT_MOMENT

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        moment, inverse = _invertible(matrix, layer)
        u, s, vh = torch.linalg.svd(layer.weight.to(matrix) @ moment, full_matrices=False)
        rank, in_instruction_mode = layer.settings.rank, layer.settings["mode"] == "instruction"
        used = slice(rank) if in_instruction_mode else slice(len(s) - rank, None)
        return {"U": u[:, used].contiguous(), "S": s[used].contiguous(), "Vh": vh[used] @ inverse}


def _invertible(moment: Tensor, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
    """Return the moment with an increased diagonal, and the inverse of the result, (in, in) each."""
    if moment.is_meta:
        return moment, moment
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for doublings in range(20):
        damped = moment + 0.01 * 2**doublings * moment.diagonal().mean() * identity
        inverse, failure = torch.linalg.inv_ex(damped)
        if not failure and torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
    raise api.UnsupportedError(f"{layer.name}: the second moment of its inputs cannot be inverted")
