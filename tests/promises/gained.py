"""Gained: LoRA with a gain for each output, a user's variant file."""

from typing import ClassVar

from torch import Tensor

from variants import api
from variants.baseline.lora import LoRA


class Gained(LoRA):
    """W' = W + s diag(g) B A."""

    hyperparameters: ClassVar = {"start": api.Number(1.0, above=0, help="initial gain")}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        """Return LoRA's tensors, and the gains, shape (out, 1)."""
        initial = random.lora()
        initial.trainable["g"] = layer.settings["start"] * layer.ones(layer.shape[0], 1)
        return initial

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A and diag(g) B."""
        return params["A"], params["g"] * params["B"]
