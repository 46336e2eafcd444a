"""LoRA-Dash: LoRA that also scales the task's directions of the weight."""

import torch
from torch import Tensor

from variants import api

DIRECTIONS = frozenset({"U", "V"})


class LoRADash(api.StepHooks, api.LowRank):
    """W' = W + s B A + U diag(d) V with s = alpha / rank; U (out, k), d (k,), V (k, in) for k = `directions`.

    After the fraction `warmup` of the steps, and after one step at least, each layer selects the k singular
    triplets (u, sigma, v) of W with the largest |u^T (s B A) v| / sigma. Their u become the columns of U, and
    their v the rows of V. Until then U and V are zero, and the optimizer skips d. A layer with a side below k
    keeps all its triplets.

    Initialization: A and B as in LoRA, d = 0, so W' = W.

    The singular values of W are computed when the directions are selected, for each layer and lane.

    Defaults: 8 directions after 100 of 1,562 steps, as in the survey; the authors use 8 directions after 100
    forward passes, whereas optimizer steps count here. Source: the authors' code (`layers_LoRA-Dash.py`).
    """

    paper = "Si et al., arXiv 2409.01035"
    deviations = "The directions share LoRA's dropout mask; the authors draw two."
    verified_by = api.VerifiedBy.AUTHORS_CODE
    mutable_buffers = DIRECTIONS
    hyperparameters = {
        "directions": api.Int(8, help="number of singular directions of the weight that are scaled"),
        "warmup": api.Number(
            100 / 1562, below=1, help="fraction of the steps before the directions are selected"
        ),
    }

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial, (out_features, in_features) = super().init(layer, random), layer.shape
        count = min(layer.settings["directions"], *layer.shape)
        zeros = initial.trainable["B"].new_zeros
        initial.trainable["d"] = zeros(count)
        initial.frozen.update(U=zeros(out_features, count), V=zeros(count, in_features))
        return initial

    def before_step(self, lane: api.LaneView) -> None:
        if lane.step < _selection_step(lane):
            for view in lane.layers.values():
                view.trainable["d"].grad = None  # AdamW's state of d begins when d begins to learn

    def after_step(self, lane: api.LaneView) -> None:
        if lane.step != _selection_step(lane):
            return
        for view in lane.layers.values():
            a, b = view.trainable["A"], view.trainable["B"]
            u, sigma, vh = torch.linalg.svd(view.layer.weight.to(a.dtype), full_matrices=False)
            change = ((u.t() @ b) * (vh @ a.t())).sum(1)  # the diagonal of U^T B A V
            largest = (change.abs() / sigma).topk(len(view.trainable["d"])).indices
            # U is divided by s, because s multiplies the whole update.
            view.frozen["U"].copy_(u[:, largest] / self.scaling(lane.settings))
            view.frozen["V"].copy_(vh[largest])

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        scaled = params["U"] * params["d"].unsqueeze(-2)
        return torch.cat([params["A"], params["V"]], dim=-2), torch.cat([params["B"], scaled], dim=-1)


def _selection_step(lane: api.LaneView) -> int:
    """Return the number of steps after which the directions are selected."""
    return max(1, round(lane.settings["warmup"] * lane.total_steps))
