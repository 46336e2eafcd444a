"""RoAd: rotates and scales pairs of the layer's outputs."""

import torch
from torch import Tensor

from variants import api
from variants.maps import OutputMap

_ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


class RoAd(api.PeftFormat, OutputMap):
    """W' = R W and bias' = R bias; R turns each pair of outputs (y1, y2) and scales it.

    y1' = a11 cos(t11) y1 - a12 sin(t12) y2 and y2' = a21 sin(t21) y1 + a22 cos(t22) y2. By `form` a pair has
    one angle t and one scale a ("road_1"), one of each per output ("road_2"), or four ("road_4").

    Initialization: t = 0 and a = 1, so W' = W. Defaults: RoAd1 with pairs of neighbours, as in the paper. In
    each group of `group_size` outputs the pairs are (i, i + group_size / 2); PEFT's default is 64, which
    pairs other outputs.

    PEFT's documentation recommends larger learning rates than LoRA's, around 1e-3.

    Source: paper, Section 3.2; PEFT, tuners/road/layer.py. The authors' repository has no code.
    """

    paper = "Liao and Monz, arXiv 2409.00119"
    year = 2024
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "form": api.Choice(
            "road_1", tuple(_ANGLES), help="1, 2 or 4 different angles and scales for each pair"
        ),
        "group_size": api.Int(2, minimum=2, divides=("out",), help="outputs among which pairs are formed"),
    }
    uses_rank = uses_alpha = uses_dropout = False
    typical_lr_scale = 10.0
    peft = api.PeftMethod(
        "ROAD",
        {"theta": "road_theta", "scale": "road_alpha"},
        rank=None,
        alpha=None,
        dropout=None,
        fields={"form": "variant", "group_size": "group_size"},
        adapts_conv1d=False,
    )

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["group_size"] % 2:
            raise api.UnsupportedError(f"group_size {settings['group_size']}: must be even")

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        scale = layer.ones(_ANGLES[layer.settings["form"]] * layer.shape[0] // 2)
        return api.InitialTensors({"theta": torch.zeros_like(scale), "scale": scale})

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return the factors of y as "own" and those of the other output of the pair as "other".

        Both are (K, 1, groups, 2, pairs): first and second outputs of the pairs of each group.
        """
        columns, rows = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[_ANGLES[layer.settings["form"]]]
        pairs = layer.settings["group_size"] // 2
        theta, scale = (
            params[name].unflatten(1, (-1, columns, rows, pairs)).expand(-1, -1, 2, 2, -1)
            for name in ("theta", "scale")
        )
        own = scale[:, :, 0] * theta[:, :, 0].cos()
        other = scale[:, :, 1] * theta[:, :, 1].sin()
        signs = torch.tensor([[-1.0], [1.0]], dtype=other.dtype, device=other.device)
        return {"own": own.unsqueeze(1), "other": (signs * other).unsqueeze(1)}

    def map_output(self, y: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        grouped = y.unflatten(2, params["own"].shape[2:])
        mapped = grouped * params["own"] + grouped.flip(-2) * params["other"]
        return mapped.to(y.dtype).view(y.shape)
