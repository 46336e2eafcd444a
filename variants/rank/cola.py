"""COLA: LoRAs that are trained and merged one by one."""

from torch import Tensor

from variants import api
from variants.rank.relora import ReLoRA


class COLA(ReLoRA):
    """W' = W + s (B A + sum over i of Bi Ai) with s = alpha / rank.

    As in ReLoRA, B A joins the frozen products Bi Ai after each part of the training, A is drawn again, and B
    becomes zero. Unlike in ReLoRA, the optimizer of A and B begins anew (moments and step counter), and the
    learning rate does not warm up again.

    Initialization: as in LoRA, for each LoRA of the chain, so W' = W.

    Default: a chain of 3 LoRAs, so 2 merges. Source: the paper's algorithm (a LoRA is trained, merged into
    the weight, and followed by a new one with a new optimizer state); the authors have published no code.
    The parts of the training have equal lengths.
    """

    paper = "Xia et al., arXiv 2401.04151"
    verified_by = api.VerifiedBy.PAPER
    hyperparameters = {"merges": api.Int(2, help="number of times that B A is merged")}

    def schedule_lr_scale(self, step: int, total_steps: int, settings: api.VariantSettings) -> float:
        return 1.0

    def restart_optimizer(self, lane: api.LaneView, parameter: Tensor) -> None:
        lane.optimizer.state.pop(parameter, None)
