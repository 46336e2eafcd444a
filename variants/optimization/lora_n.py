"""LoRAN: a sine-shaped nonlinear function of LoRA's weight update."""

from torch import Tensor

from variants import api


class LoRAN(api.DenseUpdate):
    """W' = W + s f(B A), elementwise, with f(z) = z + amplitude z sin(frequency z) and s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    The defaults are those of the authors' published adapters. With this amplitude the update differs from
    LoRA's by at most 0.005 %. The survey's code applies f to the outputs B A x, which cannot be
    merged, and has a frequency of 1000.

    Source: src/peft/tuners/mlora.py of liyinqiao2012/PEFT-LoRAN, with one layer and without its optional P
    and b, as in the authors' adapters (`mlora_use_P` and `mlora_use_b` are false).
    """

    paper = "Li et al., EMNLP Findings 2024"
    year = 2024
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "amplitude": api.Number(5e-5, help="relative size of the sine"),
        "frequency": api.Number(1e4, above=0, help="angular frequency of the sine"),
    }

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        product = params["B"] @ params["A"]
        wave = (layer.settings["frequency"] * product).sin()
        return layer.scaling * (product + layer.settings["amplitude"] * product * wave)
