"""RaSA: layers of one type give some ranks to a pool that all use."""

from collections import Counter

import torch
from torch import Tensor

from variants import api
from variants.hooks import largest_sides


class RaSA(api.InitTogether, api.SharedTensors, api.LowRank):
    """W' = W + [B, sB] diag(E) [A; sA], with a pool sA (k L, in), sB (out, k L) for the L layers of one type.

    A (rank - k, in), B (out, rank - k) and E (rank - k + k L, 1) belong to one layer. A type is all layers
    whose names differ only in indices. The rank of the update, and of the LoRA as
    which an adapter is exported, is rank - k + k L.

    Initialization: A and sA from U(-1/sqrt(in), 1/sqrt(in)), B = sB = 0, so W' = W; E is
    0.5 alpha / (rank - k) for the layer's own ranks and 0.5 alpha / (k L) for the pool's. There is no other
    factor alpha / rank.

    Default: k = 1 of `rank` 8, the survey's and the authors'.

    Source: `tuners/rasa/` of the authors' code (zwhe99/RaSA).
    """

    paper = "He et al., arXiv 2503.12576"
    year = 2025
    deviations = """The authors' code refuses layers of one type with different shapes; here the pool has the
    largest shape, and a layer uses a part of it."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"shared": api.Int(1, help="ranks k that each layer gives to the pool; below the rank")}

    def scaling(self, settings: api.VariantSettings) -> float:
        return 1.0

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["shared"] >= settings.rank:
            raise api.UnsupportedError(f"shared {settings['shared']}: must be below the rank {settings.rank}")

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        pool = random.lora(settings["shared"] * len(layers), largest_sides(layers))
        return api.InitialTensors({f"s{name}": tensor for name, tensor in pool.trainable.items()})

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        settings = api.shared_settings(layers)
        assert settings.alpha is not None
        own = settings.rank - settings["shared"]
        sizes = Counter(self.layer_group(name) for name in layers)
        initial = {}
        for name in layers:
            pool = settings["shared"] * sizes[self.layer_group(name)]
            tensors = random_of(name).lora(own).trainable
            tensors["E"] = tensors["A"].new_full((own + pool, 1), 0.5 * settings.alpha / own)
            tensors["E"][own:] = 0.5 * settings.alpha / pool
            initial[name] = api.InitialTensors(tensors)
        return initial

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = self.own_part(params["sA"], params["sB"], layer)
        return params["E"] * torch.cat([params["A"], a], dim=-2), torch.cat([params["B"], b], dim=-1)
