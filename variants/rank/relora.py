"""ReLoRA: LoRA that is merged and restarted during training."""

import math

import torch
from torch import Tensor

from variants import api


class ReLoRA(api.StepHooks, api.RateScales, api.LowRank):
    """W' = W + s (B A + sum over i of Bi Ai) with s = alpha / rank.

    The update is a sum of rank up to rank * (merges + 1).

    Initialization: as in LoRA, so W' = W. The frozen factors are allocated from the start, as zeros.

    The total steps are divided into merges + 1 equal parts. After each part but the last:
    - B A joins the frozen products Bi Ai (and not W: this is exact in every dtype and needs one base model
      for all lanes; dropout does not apply to it, as it would not to W).
    - A is drawn again and B becomes zero, so W' does not change.
    - Both Adam moments of A and B become zero where |exp_avg| is smallest, for the fraction `pruned` of the
      values.
    - The learning rate warms up from zero to its schedule again ("jagged cosine"), linearly over the fraction
      `warmup` of the total steps, for at least one step.

    Defaults: 3 merges and a warm-up of 10 of 1,562 steps, as in the survey; pruning as the paper
    states it ("we set 99% of low-magnitude optimizer state values to zero"; the authors' code resets 99.9 %
    at random).
    """

    paper = "Lialin et al., arXiv 2307.05695"
    deviations = """
    - In the authors' code each moment is pruned by its own magnitude. Then an exp_avg may be kept whose
      exp_avg_sq is not, and it is divided by epsilon, because with B = 0 the gradient of A is zero. After a
      warm-up of one step such a lane diverges.
    - The paper trains at full rank before the first LoRA; here the base model's pretraining takes that place.
    - If a part would have fewer than two steps, there are fewer merges, because A does not move in the first
      step of a part."""
    verified_by = api.VerifiedBy.PAPER
    mutable_buffers = frozenset({"merged A", "merged B"})
    frozen_update_buffers = mutable_buffers
    hyperparameters = {
        "merges": api.Int(3, help="number of times that B A is merged"),
        "warmup": api.Number(10 / 1562, below=1, help="fraction of the total steps of each warm-up"),
        "pruned": api.Number(0.99, below=1, help="fraction of the Adam moments that a merge sets to zero"),
    }

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        merged_rank = layer.settings.rank * layer.settings["merges"]
        a, b = initial.trainable["A"], initial.trainable["B"]
        initial.frozen["merged A"] = a.new_zeros(merged_rank, a.shape[1])
        initial.frozen["merged B"] = b.new_zeros(b.shape[0], merged_rank)
        return initial

    def schedule_lr_scale(self, step: int, total_steps: int, settings: api.VariantSettings) -> float:
        warm = max(1, math.ceil(round(settings["warmup"] * total_steps, 9)))
        since = min(
            (step - merge_step for merge_step in _merge_steps(total_steps, settings) if merge_step <= step),
            default=warm,
        )
        return min(1.0, (since + 1) / (warm + 1))

    def after_step(self, lane: api.LaneView) -> None:
        points = _merge_steps(lane.total_steps, lane.settings)
        if lane.step not in points:
            return
        rank, done = lane.settings.rank, points.index(lane.step)
        rank_slice = slice(done * rank, (done + 1) * rank)
        for name, view in lane.layers.items():
            a, b = view.trainable["A"], view.trainable["B"]
            view.frozen["merged A"][rank_slice] = a
            view.frozen["merged B"][:, rank_slice] = self.merged_fraction(lane.settings) * b
            self.restart_factors(lane, name)
            for parameter in (a, b):
                self.restart_optimizer(lane, parameter)

    def merged_fraction(self, settings: api.VariantSettings) -> float:
        """Return the fraction of B A that joins the frozen products."""
        return 1.0

    def restart_factors(self, lane: api.LaneView, layer: str) -> None:
        """Change A and B of a layer after a merge."""
        view = lane.layers[layer]
        view.trainable["A"].copy_(lane.random(layer).lora().trainable["A"])
        view.trainable["B"].zero_()

    def restart_optimizer(self, lane: api.LaneView, parameter: Tensor) -> None:
        """Set both moments of AdamW to zero where |exp_avg| is smallest.

        `after_step` calls this method after each merge.
        """
        moments = lane.moments(parameter)
        first = moments["exp_avg"].flatten()
        # A sort, because torch.quantile refuses more than 16 million values.
        smallest = first.abs().argsort(stable=True)[: int(lane.settings["pruned"] * len(first))]
        for moment in moments.values():
            moment.view(-1)[smallest] = 0

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = super().factors(params, layer)
        if "merged A" not in params:
            return a, b
        merged_a, merged_b = self.frozen_factors(params)
        return torch.cat([a, merged_a], dim=-2), torch.cat([b, merged_b], dim=-1)

    def frozen_factors(self, params: api.Params) -> tuple[Tensor, Tensor]:
        return params["merged A"], params["merged B"]


def _merge_steps(total_steps: int, settings: api.VariantSettings) -> list[int]:
    """Return the numbers of steps after which a merge is due."""
    parts = min(settings["merges"] + 1, total_steps // 2)
    return [total_steps * part // parts for part in range(1, parts)]
