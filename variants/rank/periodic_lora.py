"""PeriodicLoRA: a part of LoRA's update is merged after each stage."""

from variants import api
from variants.rank.cola import COLA


class PeriodicLoRA(COLA):
    """W' = W + s (B A + sum over i of m Bi Ai) with s = alpha / rank and m = `momentum`.

    The training is divided into merges + 1 stages of equal length. After each stage but the last, m times the
    product B A joins the frozen products, A and B are multiplied by 1 - m, and the optimizer of A and B
    begins anew. If m is 1, A is drawn again and B becomes zero, as in COLA.

    For m below 1, W' changes at a merge: of s B A, the part m + (1 - m)^2 remains.

    Initialization: as in LoRA, so W' = W.

    Default: m is 0.1 and there are 3 merges. Source: the survey's code (`plora.py`), since the authors have
    published none, and the paper's abstract.
    """

    paper = "Meng et al., arXiv 2402.16141"
    deviations = """The survey's code merges after every step and keeps the optimizer's state, although the
    paper reinitializes it after each stage. With m = 1 that code sets A and B to zero, and they stay zero.
    According to a summary, the paper also restarts the learning-rate schedule in each stage; here one
    schedule spans all stages. Not confirmed: that the paper too multiplies both A and B by 1 - m, and that
    its momentum is the merged fraction, not the kept one."""
    hyperparameters = {
        "merges": api.Int(3, help="number of times that a part of B A is merged"),
        "momentum": api.Number(0.1, above=0, maximum=1, help="fraction of B A that is merged"),
    }

    def merged_fraction(self, settings: api.VariantSettings) -> float:
        return settings["momentum"]

    def restart_factors(self, lane: api.LaneView, layer: str) -> None:
        kept = 1 - self.merged_fraction(lane.settings)
        if kept == 0:
            super().restart_factors(lane, layer)
            return
        for parameter in lane.layers[layer].trainable.values():
            parameter.mul_(kept)
