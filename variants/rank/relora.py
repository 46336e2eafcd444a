"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): LoRA that is merged and started anew on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    Checked,
    Extra,
    LaneView,
    Layer,
    Params,
    Settings,
    Start,
    real_number,
    vanilla_start,
    whole_number,
)
from variants.baseline.lora import LoRA


class ReLoRA(LoRA):
    """W' = W + s (B A + sum over i of Bi Ai), s = alpha / rank: a sum of rank up to rank * (merges + 1).

    Start as LoRA. The horizon has merges + 1 equal parts. After each but the last, B A joins the frozen Bi Ai
    (not W: exact in every dtype, and over one base for all lanes; dropout does not apply to it, as it would
    not to W), A is drawn anew and B is zero, so W' stays as it is. Then Adam is made to forget: both moments
    of each A and B become zero where exp_avg is smallest, in the share `pruned` of all places; and the
    learning rate warms up again from zero to its schedule, linearly over `warmup` of the horizon, at least
    one step ("jagged cosine"). Parameters: rank * (in + out) a layer; the frozen factors are there from the
    start, as zeros.

    Defaults: 3 merges and 10 of 1,562 steps of warm-up, as in the published study; pruning as the paper says
    it ("we set 99% of low-magnitude optimizer state values to zero"; the authors' code calls 99.9 % at random
    a reset). Deviations: there, each moment is pruned by its own magnitude; but an exp_avg that is kept over
    an exp_avg_sq that is not is divided by epsilon, as with B = 0 the gradient of A is zero, and after a
    warm-up of one step nothing is left of such a lane. The paper's training at full rank before the first
    LoRA is the pretraining that the base has behind it. A horizon that leaves a part fewer than two steps
    gets fewer merges: nothing moves A in a part's first step.
    """

    name: ClassVar[str] = "relora"
    title: ClassVar[str] = "ReLoRA"
    axis: ClassVar[str] = "rank"
    paper: ClassVar[str] = "2307.05695"
    checked: ClassVar[Checked] = Checked.PAPER
    moving: ClassVar[frozenset[str]] = frozenset({"merged A", "merged B"})
    frozen_part: ClassVar[frozenset[str]] = moving
    extra: ClassVar[Extra] = {"merges": 3, "warmup": 10 / 1562, "pruned": 0.99}

    def checked_settings(self, settings: Settings) -> Settings:
        settings = super().checked_settings(settings)
        whole_number(settings, "merges")
        real_number(settings, "warmup", below=1)
        real_number(settings, "pruned", below=1)
        return settings

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        begin = super().start(layer, settings, generator)
        room = settings.rank * whole_number(settings, "merges")
        a, b = begin.trainable["A"], begin.trainable["B"]
        begin.frozen["merged A"] = a.new_zeros(room, a.shape[1])
        begin.frozen["merged B"] = b.new_zeros(b.shape[0], room)
        return begin

    def schedule_scale(self, step: int, steps: int, settings: Settings) -> float:
        warm = max(1, math.ceil(round(real_number(settings, "warmup") * steps, 9)))
        since = min((step - at for at in _merges(steps, settings) if at <= step), default=warm)
        return min(1.0, (since + 1) / (warm + 1))

    def after_step(self, lane: LaneView) -> None:
        points = _merges(lane.steps, lane.settings)
        if lane.step not in points:
            return
        rank, done = lane.settings.rank, points.index(lane.step)
        own = slice(done * rank, (done + 1) * rank)
        for name, view in lane.layers.items():
            a, b = view.trainable["A"], view.trainable["B"]
            view.frozen["merged A"][own] = a
            view.frozen["merged B"][:, own] = b
            a.copy_(vanilla_start(view.layer, lane.settings, lane.generator(name)).trainable["A"])
            b.zero_()
            for parameter in (a, b):
                _prune(lane.moments(parameter), real_number(lane.settings, "pruned"))

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        a, b = super().factors(params)
        if "merged A" not in params:
            return a, b
        merged_a, merged_b = self.frozen_factors(params)
        return torch.cat([a, merged_a], dim=-2), torch.cat([b, merged_b], dim=-1)

    def frozen_factors(self, params: Params) -> tuple[Tensor, Tensor]:
        return params["merged A"], params["merged B"]

    def export_rank(self, settings: Settings) -> int:
        return settings.rank * (whole_number(settings, "merges") + 1)


def _merges(steps: int, settings: Settings) -> list[int]:
    """After how many steps a merge is due."""
    parts = min(whole_number(settings, "merges") + 1, steps // 2)
    return [steps * part // parts for part in range(1, parts)]


def _prune(moments: Mapping[str, Tensor], share: float) -> None:
    """Zeroes the smallest in place. (torch.quantile refuses more than 16 million numbers.)"""
    first = moments["exp_avg"].flatten()
    smallest = first.abs().argsort(stable=True)[: int(share * len(first))]
    for moment in moments.values():
        moment.view(-1)[smallest] = 0
