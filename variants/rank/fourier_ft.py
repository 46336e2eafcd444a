"""FourierFT: a few spectral coefficients of the weight's change learn."""

import math

import torch
from torch import Tensor

from variants import api
from variants.linalg import fill_positions


class FourierFT(api.InitTogether, api.DenseUpdate):
    """W' = W + scale * real part of IDFT(F), where F (out, in) has `frequencies` trainable entries, others 0.

    The inverse discrete Fourier transform in two dimensions includes the factor 1 / (in * out). There is
    neither a rank nor an alpha. "locations" (2, frequencies) are the entries' rows and columns, drawn without
    replacement.

    Initialization: the entries from N(0, 1), so W' differs from W.

    Rule, initialization and defaults are those of PEFT. The paper's scale for LLaMA and ViT is 300. As with
    the paper's shared entries, layers of equal shape have equal locations; they follow from the lane's seed.

    A lane is not exported to PEFT, whose file holds the entries without their locations: PEFT draws others
    from a seed in its config, and a file with all in * out entries would be as large as the weights.
    `peft:FOURIERFT` trains with PEFT's locations.
    """

    paper = "Gao et al., arXiv 2405.03003"
    deviations = """In a layer with fewer than `frequencies` weights, which PEFT refuses, every entry is
    trainable."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    start = api.Start.OTHER
    typical_lr_scale = 100.0
    uses_rank = uses_alpha = uses_dropout = False
    hyperparameters = {
        "frequencies": api.Int(1000, help="number of trainable spectral entries of a layer"),
        "scale": api.Number(150.0, above=0, help="factor in front of the update"),
    }
    peft_obstacle = "PEFT draws the locations from a seed of its own; `peft:FOURIERFT` trains with PEFT's"

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        initial: dict[str, api.InitialTensors] = {}
        shared: dict[tuple[int, int], Tensor] = {}
        for name, layer in layers.items():
            random, count = random_of(name), min(layer.settings["frequencies"], math.prod(layer.shape))
            if layer.shape not in shared:
                shared[layer.shape] = random.positions("locations", count)
            entries, locations = random.normal("entries", (count,), 1.0), shared[layer.shape].clone()
            initial[name] = api.InitialTensors({"entries": entries}, {"locations": locations})
        return initial

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        spectrum = fill_positions(params["entries"], params["locations"], layer.shape)
        return layer.settings["scale"] * torch.fft.ifft2(spectrum).real
