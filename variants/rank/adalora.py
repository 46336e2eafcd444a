"""AdaLoRA: an SVD is trained, and unimportant triplets are pruned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variants import api

INIT_STD = 0.02
"""Standard deviation of the initial A and B."""
EMA_DECAY = 0.85
"""Decay of the running averages of importance and uncertainty (the paper's beta1 and beta2)."""
AVERAGE_BUFFERS = frozenset(f"{kind} {name}" for kind in ("importance", "uncertainty") for name in "AEB")


class AdaLoRA(api.StepHooks, api.RankAllocation, api.AuxiliaryLoss, api.LowRank):
    """W' = W + s B diag(E) A with s = alpha / (initial rank + 1e-5), as in PEFT.

    Initialization: A and B from N(0, 0.02^2), E = 0, so W' = W. Every layer begins with `initial` * rank
    triplets (a row of A, an entry of E, a column of B); `rank` is the mean number of triplets per layer at
    the end.

    The loss gains `orthogonality` times the mean of |A A^T - I| and |B^T B - I| over all layers.

    After each step the importance of a value p is the running average of |p * gradient| times the running
    average of its deviation from that average. A triplet's score is the importance of its E plus the mean
    importance of its row of A plus that of its column of B. After step t, E is set to zero for all but the
    b(t) triplets of all layers with the highest scores. The budget b(t) is the initial number up to t_i and
    then falls cubically to layers * rank at T - t_f. Until then a pruned triplet may return; afterwards it
    may not. T is the total number of steps, t_i = `warmup` * T and t_f = `final` * T.

    Defaults: t_i = 100 and t_f = 900 of T = 1,562 steps and ranks 12 -> 8, as in the survey; pruning at
    every step and averages of 0.85, as in PEFT. Where the initial rank exceeds the smaller side of a layer
    (`rank` must not), the rows cannot all be orthogonal, as in PEFT.
    """

    paper = "Zhang et al., arXiv 2303.10512"
    year = 2023
    deviations = """PEFT's orthogonality loss moves the A and B of pruned triplets until T. Here their
    gradients are zero after T - t_f."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    numerics = 2
    typical_lr_scale = 10.0
    hook_only_buffers = AVERAGE_BUFFERS
    mutable_buffers = AVERAGE_BUFFERS | {api.RANK_MASK}
    hyperparameters = {
        "initial": api.Number(1.5, above=1, help="initial rank divided by the final mean rank"),
        "warmup": api.Number(100 / 1562, help="fraction of the total steps before pruning begins"),
        "final": api.Number(900 / 1562, help="fraction of the total steps with fixed ranks at the end"),
        "orthogonality": api.Number(0.5, help="weight of the orthogonality loss"),
    }
    peft = api.PeftMethod(
        "ADALORA",
        {name: f"lora_{name}" for name in "AEB"},
        rank="target_r",
        fields={"orthogonality": "orth_reg_weight"},
    )

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["warmup"] + settings["final"] >= 1:
            raise api.UnsupportedError(
                "warmup and final: must be fractions of the total steps with a sum below 1"
            )

    def scaling(self, settings: api.VariantSettings) -> float:
        return super().scaling(settings) * settings.rank / (initial_rank(settings) + 1e-5)

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), rank = layer.shape, initial_rank(layer.settings)
        trainable = {
            "A": random.normal("A", (rank, in_features), INIT_STD),
            "E": layer.zeros(rank, 1),
            "B": random.normal("B", (out_features, rank), INIT_STD),
        }
        return api.InitialTensors(trainable, _init_buffers(trainable))

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        return params["A"] * params["E"], params["B"]

    def auxiliary_loss(
        self, x: Tensor, attention_mask: Tensor, params: api.Params, layer: api.FrozenLayer
    ) -> Tensor:
        a, b = params["A"], params["B"]
        # |X X^T - I| has twice the gradient that it has through one of the two X, which takes one product.
        products = torch.cat([torch.bmm(a, a.detach().mT), torch.bmm(b.detach().mT, b)])
        identity = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        norms = torch.linalg.vector_norm((products - identity).flatten(1), dim=1)
        doubled = 2 * norms - norms.detach()
        return doubled.view(2, -1).sum(0) * layer.settings["orthogonality"] / 2

    def before_step(self, lane: api.LaneView) -> None:
        if lane.step >= _pruning_steps(lane.settings, lane.total_steps)[1]:
            for view in lane.layers.values():
                mask = view.frozen[api.RANK_MASK]
                for name, parameter in view.trainable.items():
                    if parameter.grad is not None:
                        parameter.grad.mul_(mask.t() if name == "B" else mask)

    def after_step(self, lane: api.LaneView) -> None:
        pruning_end = _pruning_steps(lane.settings, lane.total_steps)[1]
        views = list(lane.layers.values())
        if lane.step < pruning_end:
            _update_importance(views)
        if lane.step <= pruning_end:
            left = _triplet_budget(len(views), lane.settings, lane.step, lane.total_steps)
            if left == len(views) * initial_rank(lane.settings):
                return  # all triplets are kept, and the stored mask still has its initial ones
            scores = _triplet_scores(views)
            keep_mask = torch.ones_like(scores)
            keep_mask[scores.argsort(stable=True)[: len(scores) - left]] = 0
            masks = list(keep_mask.view(len(views), -1, 1))
            torch._foreach_mul_([view.trainable["E"] for view in views], masks)
            if lane.step == pruning_end:
                torch._foreach_copy_([view.frozen[api.RANK_MASK] for view in views], masks)
        else:
            torch._foreach_mul_(
                [view.trainable["E"] for view in views], [view.frozen[api.RANK_MASK] for view in views]
            )

    def rank_budget(
        self, layer_count: int, settings: api.VariantSettings, step: int, total_steps: int
    ) -> int:
        is_pruned = step >= _pruning_steps(settings, total_steps)[1]
        return layer_count * (settings.rank if is_pruned else initial_rank(settings))

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        return {"lora_A": params["A"], "lora_E": params["E"] * params[api.RANK_MASK], "lora_B": params["B"]}

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        # PEFT requires a `total_step`, which matters only if it trains on.
        own = {"init_r": initial_rank(settings), "total_step": 1, "bias": "none"}
        return {**super().peft_config(settings), **own}

    def settings_from_peft(self, config: Mapping[str, Any]) -> api.VariantSettings:
        settings = super().settings_from_peft(config)
        return replace(settings, extra={**settings.extra, "initial": config["init_r"] / settings.rank})

    def init_from_peft(self, tensors: api.Params, settings: api.VariantSettings) -> api.InitialTensors:
        """Invert `to_peft`; the running averages, which PEFT does not save, start at zero."""
        trainable = super().init_from_peft(tensors, settings).trainable
        return api.InitialTensors(trainable, _init_buffers(trainable))


def _init_buffers(trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    averages = {name: torch.zeros_like(trainable[name[-1]]) for name in sorted(AVERAGE_BUFFERS)}
    return {**averages, api.RANK_MASK: torch.ones_like(trainable["E"])}


def initial_rank(settings: api.VariantSettings) -> int:
    """Return the rank of each layer at step 0: the hyperparameter `initial` times the rank, rounded up."""
    return math.ceil(round(settings["initial"] * settings.rank, 6))


def _pruning_steps(settings: api.VariantSettings, total_steps: int) -> tuple[int, int]:
    """Return t_i and T - t_f: the last step before pruning, and the step after which ranks stay fixed.

    At least one step is scored before T - t_f.
    """
    start = round(settings["warmup"] * total_steps)
    return start, max(2, start + 1, total_steps - round(settings["final"] * total_steps))


def _triplet_budget(layer_count: int, settings: api.VariantSettings, step: int, total_steps: int) -> int:
    """Return b(t), the number of triplets of all layers that are kept after `step` steps."""
    start, pruning_end = _pruning_steps(settings, total_steps)
    begin, end = layer_count * initial_rank(settings), layer_count * settings.rank
    if step <= start:
        return begin
    return end + int((begin - end) * (1 - (step - start) / (pruning_end - start)) ** 3)


def _update_importance(views: Sequence[api.LayerView]) -> None:
    """Update the running averages with |p * gradient| of this step; they stay where there is no gradient."""
    for name in "AEB":
        found = [(view, grad) for view in views if (grad := view.trainable[name].grad) is not None]
        if not found:
            continue
        now = torch._foreach_mul([view.trainable[name] for view, _ in found], [grad for _, grad in found])
        torch._foreach_abs_(now)
        importance = [view.frozen[f"importance {name}"] for view, _ in found]
        uncertainty = [view.frozen[f"uncertainty {name}"] for view, _ in found]
        torch._foreach_mul_(importance, EMA_DECAY)
        torch._foreach_add_(importance, now, alpha=1 - EMA_DECAY)
        torch._foreach_sub_(now, importance)
        torch._foreach_abs_(now)
        torch._foreach_mul_(uncertainty, EMA_DECAY)
        torch._foreach_add_(uncertainty, now, alpha=1 - EMA_DECAY)


def _triplet_scores(views: Sequence[api.LayerView]) -> Tensor:
    """Return the score of each triplet of all layers, (layers * rank,)."""
    products = {
        name: torch._foreach_mul(
            [view.frozen[f"importance {name}"] for view in views],
            [view.frozen[f"uncertainty {name}"] for view in views],
        )
        for name in "AEB"
    }
    means = zip(products["A"], products["E"], products["B"], strict=True)
    return torch.cat([e[:, 0] + a.mean(1) + b.mean(0) for a, e, b in means])
