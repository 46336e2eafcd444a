"""MoRA: a square matrix between fixed maps of inputs and outputs."""

import math

import torch
from torch import Tensor

from variants import api


class MoRA(api.Variant):
    """W' = W + E M C with M (d, d), d = round(sqrt(rank * (in + out))), and fixed maps C and E.

    C appends the first values of the input to its end, up to a multiple of d, and cuts it into pieces of
    length d. With `maps` "sharing", it adds the pieces up, and E repeats the d outputs of M up to length
    `out`. With "rotation", where d is rounded down to an even number, piece i is rotated as in RoPE: values
    l and l + d/2 by the angle i * 10000^(-2 l / d). M maps each piece, and E joins the results and cuts or
    repeats them to length `out`. There is no alpha.

    Initialization: M = 0, so W' = W. It involves no noise.

    "rotation" is the default, which the authors' code recommends for small ranks ("sharing" for large ones).
    As in that code, with "rotation" and in > out, the pieces after the first ceil(out / d) have no effect.

    Source: `_apply_mora` in github.com/kongds/MoRA, types 6 (equation 9 of the paper) and 1 (equation 6).
    """

    paper = "Jiang et al., arXiv 2405.12130"
    verified_by = api.VerifiedBy.AUTHORS_CODE
    uses_alpha = False
    hyperparameters = {"maps": api.Choice("rotation", ("rotation", "sharing"), help="the maps C and E")}

    def check_layer(self, layer: api.FrozenLayer) -> None:
        out_features, in_features = layer.shape
        size = _matrix_size((out_features, in_features), layer.settings)
        if not 0 < size <= min(out_features, in_features):
            raise api.UnsupportedError(
                f"{layer.name} ({out_features} x {in_features}): rank {layer.settings.rank} gives M the size "
                f"{size}; it must be from 1 to the smaller side"
            )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        size = _matrix_size(layer.shape, layer.settings)
        return api.InitialTensors({"M": layer.zeros(size, size)})

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        m = params["M"].to(x.dtype).transpose(1, 2)
        size = m.shape[1]
        pieces = torch.cat([x, x[..., : -x.shape[2] % size]], dim=2).unflatten(2, (-1, size))
        if layer.settings["maps"] == "sharing":
            update = api.bmm(pieces.sum(2), m)
        else:
            pieces = pieces[:, :, : -(-layer.shape[0] // size)]
            cos, sin = (part.to(x.dtype) for part in _rotation(layer, pieces.shape[2], size))
            first, second = pieces.chunk(2, dim=3)
            pieces = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
            update = api.bmm(pieces.flatten(1, 2), m).view(*x.shape[:2], -1)
        return base + update.repeat(1, 1, -(-layer.shape[0] // update.shape[2]))[..., : layer.shape[0]]


def _matrix_size(shape: tuple[int, int], settings: api.VariantSettings) -> int:
    step = 2 if settings["maps"] == "rotation" else 1  # values are rotated in pairs
    return round(math.sqrt(settings.rank * sum(shape))) // step * step


def _rotation(layer: api.FrozenLayer, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (count, size / 2) of the angles of `count` pieces."""
    frequencies = 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=layer.device) / size)
    angles = torch.arange(count, device=layer.device).unsqueeze(1) * frequencies
    return angles.cos().to(layer.dtype), angles.sin().to(layer.dtype)
