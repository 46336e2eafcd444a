"""SaLoRA: trainable random gates choose the ranks."""

import math

import torch
from torch import Tensor

from variants import api
from variants.rank.adalora import initial_rank

TAU, GAMMA, ZETA = 1.0, -0.1, 1.1
"""Temperature and limits of the hard concrete distribution, which is cut off at 0 and 1."""


class SaLoRA(api.StepHooks, api.RateScales, api.RankAllocation, api.LowRank):
    """W' = W + s B diag(z) A with s = alpha / rank, where z_i is a gate in [0, 1] with a trainable log d_i.

    z_i = min(1, max(0, (zeta - gamma) sigmoid((e_i + log d_i) / tau) + gamma)) with tau = 1, gamma = -0.1 and
    zeta = 1.1. In training, e_i = log(u_i / (1 - u_i)) with u_i from U(0, 1), drawn anew for each step. In
    evaluation and in the merged weight e_i = 0 (the median), and ranks with z_i = 0 are not in use.

    Shapes: A (R, in), B (out, R), log d (R, 1), where R is `initial` * rank, rounded up.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), log d = 1, B = 0, so W' = W.

    The loss gains two terms, whose gradients are added after clipping:
    - `orthogonality` times the sum over layers of |A A^T - I|^2 + |B^T B - I|^2 (Frobenius norms).
    - `budget` * (p - t)^2, where p is the mean over the ranks of all layers of the probability of z_i > 0 in
      training, which is sigmoid(log d_i - tau log(-gamma / zeta)). The target t falls linearly from 1 to
      rank / R in the fraction `warmup` of the steps. How closely it is met depends on `budget`.

    Sources: equations 46 to 49 of the survey and, for tau, gamma, zeta, the initial log d and the gate in
    evaluation, the survey's code. The paper's equations could not be read, and no code of its authors was
    found. So these are choices of this project: s, the initialization of A and B, one draw of u per step, the
    weights and normalization of the terms, their place after clipping, and `gate_lr`. `initial` is AdaLoRA's,
    and the target falls as in FLOP (arXiv 1910.04732), whose gates in training are the same.
    """

    paper = "Hu et al., Mathematics 11(20) 4317"
    year = 2023
    mutable_buffers = frozenset({"noise"})
    hyperparameters = {
        "initial": api.Number(1.5, minimum=1, help="initial rank divided by the final mean rank"),
        "budget": api.Number(5.0, help="weight of the budget term (the survey's beta)"),
        "warmup": api.Number(0.5, maximum=1, help="fraction of the steps in which the target falls"),
        "orthogonality": api.Number(1e-3, help="weight of the orthogonality term (the survey's lambda)"),
        "gate_lr": api.Number(30.0, above=0, help="learning rate of log d divided by that of A and B"),
    }

    def parameter_lr_scale(self, parameter: str, settings: api.VariantSettings) -> float:
        return settings["gate_lr"] if parameter == "log_d" else 1.0

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = random.lora(initial_rank(layer.settings))
        initial.trainable["log_d"] = layer.ones(initial_rank(layer.settings), 1)
        initial.frozen["noise"] = _draw_noise(random, initial.trainable["log_d"])
        return initial

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        if torch.is_grad_enabled():
            params = {**params, "gate": _gate(params["log_d"] + params["noise"])}
        return super().prepare(params, layer)

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        gate = params["gate"] if "gate" in params else _gate(params["log_d"])
        return params["A"] * gate, params["B"]

    def before_step(self, lane: api.LaneView) -> None:
        settings, views = lane.settings, list(lane.layers.values())
        done = min(1.0, lane.step / max(1.0, settings["warmup"] * lane.total_steps))
        target = 1 - done * (1 - settings.rank / initial_rank(settings))
        log_d = torch.stack([view.trainable["log_d"] for view in views])
        open_ = (log_d - TAU * math.log(-GAMMA / ZETA)).sigmoid()
        slope = open_ * (1 - open_) / open_.numel()
        gradients = 2 * settings["budget"] * (open_.mean() - target) * slope
        for view, gradient in zip(views, gradients, strict=True):
            _add_gradient(view.trainable["log_d"], gradient)
            for name in ("A", "B"):
                parameter = view.trainable[name]
                rows = parameter if name == "A" else parameter.t()
                error = rows @ rows.t()
                error.diagonal().sub_(1)
                gradient = 4 * settings["orthogonality"] * (error @ rows)
                _add_gradient(parameter, gradient if name == "A" else gradient.t())

    def after_step(self, lane: api.LaneView) -> None:
        for name, view in lane.layers.items():
            view.frozen["noise"].copy_(_draw_noise(lane.random(name), view.frozen["noise"]))

    def rank_in_use(self, params: api.Params, settings: api.VariantSettings) -> int:
        return int((_gate(params["log_d"]) > 0).sum())

    def rank_budget(
        self, layer_count: int, settings: api.VariantSettings, step: int, total_steps: int
    ) -> int | None:
        return None


def _draw_noise(random: api.LayerRandom, like: Tensor) -> Tensor:
    return random.uniform("noise", tuple(like.shape), 0.5).add_(0.5).logit_(1e-6)


def _gate(location: Tensor) -> Tensor:
    # On a CPU, PyTorch computes the last values of a tensor by another implementation of exp than the others.
    # In float32 the gate of a lane would therefore depend on the number of lanes.
    return ((location.double() / TAU).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1).to(location.dtype)


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
