"""GoRA: LoRA whose ranks and initial B follow from the mean gradient."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from variants import api


class GoRA(api.InitTogether, api.RankAllocation, api.Calibrated, api.LowRank):
    """W' = W + s_l B A with s_l = alpha / sqrt(r_l), where r_l is the rank of layer l.

    G is the mean gradient over `calibration_batches` batches. The importance of a layer is the mean of
    |W * G|, elementwise. With the fraction f_l that layer l has of all importance,
    r_l = f_l * rank * (sum over layers of sqrt(in + out)) / sqrt(in + out), rounded, at least
    `smallest` * rank and at most `largest` * rank and the smaller side of the layer. All layers have
    `largest` * rank ranks allocated; a frozen mask hides those that are not in use.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = -gamma sqrt(in / r_l) / s_l G A^T (A A^T)^-1.

    So W' - W begins as a step of gradient descent, projected onto the row space of A, of a size of about
    `gamma` * |G|.

    Defaults: those of the authors' scripts at rank 8 (ranks 4 to 32, gamma 0.05, 32 batches).

    Source: the paper's equations, and the authors' code (`gora.py`).
    """

    paper = "He et al., arXiv 2502.12171"
    year = 2025
    deviations = """The authors' code has a positive B, which is a step of gradient ascent, and rounds ranks
    down. Without `--gora-features-func sqrt`, which its scripts do not give, it has in + out in place of its
    root. The scripts use LoRA+'s learning rates besides. Here A is the same for all seeds, because the
    calibration statistic is reduced before seeds are known."""
    verified_by = api.VerifiedBy.PAPER
    start = api.Start.OTHER
    calibration_statistic = api.CalibrationStatistic.MEAN_GRADIENT
    hyperparameters = {
        "calibration_batches": api.Int(32, help="number of batches of the mean gradient"),
        "gamma": api.Number(0.05, help="size of the initial update, relative to the gradient"),
        "smallest": api.Number(0.5, above=0, maximum=1, help="smallest rank of a layer, relative to `rank`"),
        "largest": api.Number(4.0, minimum=1, help="largest rank of a layer, relative to `rank`"),
    }

    scaling = api.LowRank.rank_stabilized

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        random = api.LayerRandom(layer, api.stable_seed(layer.name))
        shape = min(_largest_rank(layer.settings), *layer.shape), layer.shape[1]
        a = random.kaiming("A", shape).to(matrix)
        importance = (layer.weight.to(matrix) * matrix).abs().mean()
        return {"A": a, "G A^T": matrix @ a.t(), "importance": importance.unsqueeze(0)}

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        settings = api.shared_settings(layers)
        tensors = {name: self.calibrated(layer, "importance")[0] for name, layer in layers.items()}
        importance = {name: 1.0 if each.is_meta else each.item() for name, each in tensors.items()}
        widths = {name: math.sqrt(sum(layer.shape)) for name, layer in layers.items()}
        unit = settings.rank * sum(widths.values()) / (sum(importance.values()) or 1.0)
        smallest = max(1, round(settings.rank * settings["smallest"]))
        initial = {}
        for name, layer in layers.items():
            rank = round(unit * importance[name] / widths[name])
            initial[name] = self._init_layer(layer, max(smallest, rank))
        return initial

    def _init_layer(self, layer: api.FrozenLayer, rank: int) -> api.InitialTensors:
        settings, (a, ga) = layer.settings, self.calibrated(layer, "A", "G A^T")
        a, ga = a[:rank], ga[:, :rank]
        rank = len(a)  # at most the largest rank, and the smaller side of the layer
        scaling = self.scaling(settings) * math.sqrt(settings.rank / rank)
        size = settings["gamma"] * math.sqrt(layer.shape[1] / rank) / scaling
        hidden = _largest_rank(settings) - rank
        mask = (torch.arange(rank + hidden, device=a.device) < rank).to(a)
        trainable = {
            "A": pad(a, (0, 0, 0, hidden)),
            "B": pad(-size * torch.linalg.solve(a @ a.t(), ga, left=False), (0, hidden)),
        }
        return api.InitialTensors(trainable, {api.RANK_MASK: mask})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        mask = params[api.RANK_MASK]
        # `scaling` divides by sqrt(rank), but s_l by sqrt(r_l).
        used = mask * (layer.settings.rank / mask.sum(-1, keepdim=True)).sqrt()
        return params["A"], params["B"] * used.unsqueeze(-2)

    def rank_budget(
        self, layer_count: int, settings: api.VariantSettings, step: int, total_steps: int
    ) -> None:
        """Return None, because the ranks are rounded for each layer."""


def _largest_rank(settings: api.VariantSettings) -> int:
    """Return the number of ranks that each layer has allocated."""
    return round(settings.rank * settings["largest"])
