"""FourierFT (Gao et al. 2024, arXiv 2405.03003): a few spectral coefficients of the weight's change learn."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    GeneratorOf,
    InitialTensors,
    Int,
    Layers,
    Number,
    Params,
    Start,
    VerifiedBy,
    normal_init,
    parameter_generator,
)
from variants.dense_update import DenseUpdate
from variants.initializers import distinct_init


class FourierFT(DenseUpdate):
    """W' = W + scale * real part of IDFT(F), where F (out, in) has `frequencies` trainable entries, others 0.

    The inverse discrete Fourier transform in two dimensions includes the factor 1 / (in * out). There is
    neither a rank nor an alpha. "locations" (2, frequencies) are the entries' rows and columns, drawn without
    replacement.

    Initialization: the entries from N(0, 1), so W' differs from W.

    Rule, initialization and defaults are those of PEFT. The paper's scale for LLaMA and ViT is 300. As with
    the paper's shared entries, layers of equal shape have equal locations; they follow from the lane's seed.

    Deviations: PEFT draws the locations from a fixed seed, which is why lanes cannot be exported to it. In a
    layer with fewer than `frequencies` weights, which PEFT refuses, every entry is trainable.
    """

    parameters = "min(frequencies, in * out)"
    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    start = Start.OTHER
    typical_lr_scale = 100.0
    law_settings = {"frequencies": 60, "scale": 5.0}
    uses_rank = False
    uses_alpha = False
    uses_dropout = False
    hyperparameters = {
        "frequencies": Int(1000, minimum=1, help="number of trainable spectral entries of a layer"),
        "scale": Number(150.0, above=0, help="factor in front of the update"),
    }

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        in_features, size = layer.shape[1], layer.shape[0] * layer.shape[1]
        count = min(layer.settings["frequencies"], size)
        entries = normal_init((count,), 1.0, layer, parameter_generator(generator, "entries"))
        chosen = distinct_init(count, size, parameter_generator(generator, "locations"))
        locations = torch.stack([chosen // in_features, chosen % in_features]).int()
        return InitialTensors({"entries": entries}, {"locations": locations.to(layer.device)})

    def init_layers(self, layers: Layers, generator: GeneratorOf) -> dict[str, InitialTensors]:
        found = super().init_layers(layers, generator)
        first: dict[tuple[int, int], Tensor] = {}
        for name, layer in layers.items():
            shared = first.setdefault(layer.shape, found[name].frozen["locations"])
            found[name].frozen["locations"] = shared.clone()
        return found

    def matrix(self, params: Params, layer: FrozenLayer) -> Tensor:
        (out_features, in_features), entries = layer.shape, params["entries"]
        rows, columns = params["locations"].long().unbind(1)
        spectrum = entries.new_zeros(len(entries), out_features * in_features)
        spectrum = spectrum.scatter(1, rows * in_features + columns, entries).view(-1, *layer.shape)
        return layer.settings["scale"] * torch.fft.ifft2(spectrum).real
