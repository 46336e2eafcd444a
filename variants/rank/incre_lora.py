"""IncreLoRA: an SVD is trained, and important layers gain triplets."""

import math

import torch
from torch import Tensor

from variants import api

EMA_DECAY = 0.85
"""Decay of the running averages of importance and uncertainty (the paper's beta1 and beta2)."""
RESERVE_VALUE = 1e-5
"""E of a triplet in reserve."""
HOOK_TENSORS = frozenset({"old A", "old B", "old E", "age", "age E", "importance", "uncertainty"})


class IncreLoRA(api.StepHooks, api.RankAllocation, api.AuxiliaryLoss, api.LowRank):
    """W' = W + s B diag(E) A with s = alpha / (r + 1e-5), where r is the present rank of the layer.

    A triplet is a row of A, an entry of E and a column of B. Each layer begins with `initial` triplets. In
    each round, the fraction `top` of the layers, those of the highest importance, gain one triplet each,
    until layers * rank triplets are in use. The rounds have equal intervals, the first one comes after two
    intervals, and the last one after the fraction `growth` of the steps. A layer has at most `largest` * rank
    triplets.

    The importance of a layer is the running average of |E * g_E|, summed over triplets and divided by
    sqrt(in * out), times the running average of its deviation from that average.

    Each layer has one more triplet in reserve, whose E is 1e-5 and whose A and B learn already ("advance
    learning"). When the layer gains it, its E begins to learn too, and another triplet becomes the reserve.
    After the last round the reserves get E = 0. AdamW counts the steps of an added triplet from its own first
    step, and its learning rate warms up over the fraction `warmup` of the steps.

    The loss gains `orthogonality` times the mean of |A A^T - I| and |B^T B - I| over all layers, with all
    triplets of a layer that learn, and Frobenius norms.

    Initialization: A and B from N(0, 0.02^2), E = 0, so W' = W.

    Defaults: those of the authors' script for MNLI at rank 8 (from rank 1, 18 of 72 layers in each of 28
    rounds, which are over after 29,000 of 85,904 steps; their other scripts for rank 8 add four triplets at
    once). Source: the authors' code (`increlora.py`, and the loss of `compute_svd_orth_regu` in their
    trainer, which their scripts use instead of `compute_orth_regu`).
    """

    paper = "Zhang et al., arXiv 2308.12043"
    year = 2023
    deviations = """
    - The importance in the authors' code is the sum of |dW * g_dW| over all entries of the update dW. It
      needs the gradient with respect to the full matrix, which is not computed here. The sum over the
      rank-one parts of dW in use replaces the sum over its entries. The code's gradient is that of the last
      micro-batch before clipping; here it is the clipped gradient of the whole batch.
    - The number of triplets of a layer is limited, and layers with equal importance do not gain together.
    - After the last round the code keeps the unused reserves in the orthogonality loss.
    - The code's learning rate of added triplets also decays from its full value to zero after their warm-up.
    """
    verified_by = api.VerifiedBy.AUTHORS_CODE
    mutable_buffers = HOOK_TENSORS | {api.RANK_MASK, "live"}
    hook_only_buffers = HOOK_TENSORS
    hyperparameters = {
        "initial": api.Int(1, help="number of triplets of a layer at the start"),
        "top": api.Number(
            0.25, above=0, maximum=1, help="fraction of the layers that gain a triplet in a round"
        ),
        "growth": api.Number(
            0.34, above=0, below=1, help="fraction of the steps after which ranks are final"
        ),
        "warmup": api.Number(0.012, below=1, help="fraction of the steps in which an added triplet warms up"),
        "orthogonality": api.Number(0.1, help="weight of the orthogonality loss"),
        "largest": api.Number(4.0, minimum=1, help="largest rank of a layer, relative to `rank`"),
    }

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["initial"] > settings.rank:
            raise api.UnsupportedError(
                f"initial {settings['initial']}: must not exceed the rank {settings.rank}"
            )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), allocated = layer.shape, _largest_rank(layer.settings)
        trainable = {
            "A": random.normal("A", (allocated, in_features), 0.02),
            "B": random.normal("B", (out_features, allocated), 0.02),
        }
        trainable["E"] = trainable["A"].new_zeros(allocated, 1)
        mask = (torch.arange(allocated) < layer.settings["initial"]).to(trainable["E"]).unsqueeze(1)
        frozen = {f"old {name}": tensor for name, tensor in trainable.items()}
        frozen |= {api.RANK_MASK: mask, "live": mask}
        frozen |= {name: torch.zeros_like(mask) for name in ("age", "age E")}
        frozen |= {name: mask.new_zeros(1) for name in ("importance", "uncertainty")}
        return api.InitialTensors(trainable, frozen)

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        ranks = params[api.RANK_MASK].sum(-2, keepdim=True) + 1e-5
        # E gets no gradient in reserve ranks, so neither the clipping nor the importance includes them.
        e = torch.where(params[api.RANK_MASK] > 0, params["E"], params["E"].detach())
        # `scaling` divides by `rank`, but s by the present rank.
        return params["A"] * (e * params["live"] * (layer.settings.rank / ranks)), params["B"]

    def auxiliary_loss(
        self, x: Tensor, attention_mask: Tensor, params: api.Params, layer: api.FrozenLayer
    ) -> Tensor:
        live = params["live"]
        a, b = params["A"] * live, params["B"] * live.transpose(1, 2)
        products = a @ a.transpose(1, 2), b.transpose(1, 2) @ b
        identity = torch.diag_embed(live.squeeze(-1))
        norms = [(product - identity).flatten(1).norm(dim=1) for product in products]
        return layer.settings["orthogonality"] / 2 * (norms[0] + norms[1])

    def before_step(self, lane: api.LaneView) -> None:
        for view in lane.layers.values():
            for name, parameter in view.trainable.items():
                view.frozen[f"old {name}"].copy_(parameter)
            gradient = view.trainable["E"].grad
            if gradient is not None:
                _update_importance(view, gradient)

    def after_step(self, lane: api.LaneView) -> None:
        views, settings = list(lane.layers.values()), lane.settings
        for view in views:
            _restep(lane, view)
        before = lane.step - 1  # as in the authors' code, the current step is not counted
        budget = self.rank_budget(len(views), settings, before, lane.total_steps)
        if before == 0 or budget > self.rank_budget(len(views), settings, before - 1, lane.total_steps):
            self._add_triplets(views, budget, settings)

    def _add_triplets(self, views: list[api.LayerView], budget: int, settings: api.VariantSettings) -> None:
        """Give triplets to the most important layers until `budget` are in use, and set up the reserves."""
        scores = [float(view.frozen["importance"] * view.frozen["uncertainty"]) for view in views]
        order = sorted(range(len(views)), key=scores.__getitem__, reverse=True)
        ranks = [int(view.frozen[api.RANK_MASK].sum()) for view in views]
        limits = [min(_largest_rank(settings), *view.layer.shape) for view in views]
        while sum(ranks) < budget:
            count = min(_layers_per_round(len(views), settings), budget - sum(ranks))
            for index in [i for i in order if ranks[i] < limits[i]][:count]:
                ranks[index] += 1
        reserves = int(budget < len(views) * settings.rank)
        for view, rank, limit in zip(views, ranks, limits, strict=True):
            mask, live, e = view.frozen[api.RANK_MASK], view.frozen["live"], view.trainable["E"]
            mask[:rank] = 1
            live[: min(rank + reserves, limit)] = 1
            live[min(rank + reserves, limit) :] = 0
            e.mul_(live)
            e.copy_(torch.where((live > mask) & (e == 0), RESERVE_VALUE, e))

    def rank_budget(
        self, layer_count: int, settings: api.VariantSettings, step: int, total_steps: int
    ) -> int:
        final, initial = layer_count * settings.rank, layer_count * settings["initial"]
        per_round = _layers_per_round(layer_count, settings)
        rounds = math.ceil((final - initial) / per_round)
        done = min(1.0, step / max(1.0, settings["growth"] * total_steps))
        intervals = math.floor(round((rounds + 1) * done, 9))
        return min(final, initial + max(0, intervals - 1) * per_round)


def _largest_rank(settings: api.VariantSettings) -> int:
    return round(settings.rank * settings["largest"])


def _layers_per_round(layer_count: int, settings: api.VariantSettings) -> int:
    return max(1, round(settings["top"] * layer_count))


def _update_importance(view: api.LayerView, gradient: Tensor) -> None:
    """Update the running averages of a layer with |E * g_E|."""
    importance, uncertainty = view.frozen["importance"], view.frozen["uncertainty"]
    now = (view.trainable["E"] * gradient).abs().sum() / math.sqrt(math.prod(view.layer.shape))
    importance.lerp_(now, 1 - EMA_DECAY)
    uncertainty.lerp_((now - importance).abs(), 1 - EMA_DECAY)


def _restep(lane: api.LaneView, view: api.LayerView) -> None:
    """Take the step of added triplets again, as AdamW whose counter began with the triplet, with a warm-up.

    AdamW counts the steps of whole tensors. With that counter, the first steps of a new row would be several
    times too large. Rows that do not learn get their old values.
    """
    options, initial = lane.optimizer.defaults, lane.settings["initial"]
    (beta1, beta2), epsilon = options["betas"], options["eps"]
    warmup = max(1, round(lane.settings["warmup"] * lane.total_steps))
    view.frozen["age"].add_(view.frozen["live"])
    view.frozen["age E"].add_(view.frozen[api.RANK_MASK])
    for name, parameter in view.trainable.items():
        moments = lane.moments(parameter)
        if not moments:
            continue
        age = view.frozen["age E" if name == "E" else "age"]
        age = age.t() if name == "B" else age
        steps = age.clamp_min(1)
        size = (moments["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(epsilon)
        update = moments["exp_avg"] / (1 - beta1**steps) / size
        rate = lane.learning_rate(parameter) * (age / warmup).clamp_max(1)
        old = view.frozen[f"old {name}"]
        new = old - rate * (update + lane.weight_decay(parameter) * old)
        added = (slice(None), slice(initial, None)) if name == "B" else slice(initial, None)
        parameter[added] = new[added]
