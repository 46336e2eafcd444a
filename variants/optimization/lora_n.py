"""LoRAN (Li et al., EMNLP Findings 2024): a sine-shaped nonlinear function of LoRA's weight update."""

from torch import Tensor

from variants import api
from variants.dense_update import DenseUpdate


class LoRAN(DenseUpdate):
    """W' = W + s f(B A), elementwise, with f(z) = z + amplitude z sin(frequency z) and s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    f and its defaults are those of the published study's code, because the authors published no code. The
    study's code applies f to the outputs B A x, which cannot be merged. Here f applies to the weights: the
    paper's abstract says that f is to fit the accumulated weight updates. With the default amplitude of
    0.00005 the update differs from LoRA's by at most 0.005 %.

    Source: common/lora_modules/loran.py of the published study; the paper's equations are not confirmed.
    """

    parameters = "rank * (in + out)"
    hyperparameters = {
        "amplitude": api.Number(5e-5, help="relative size of the sine"),
        "frequency": api.Number(1000.0, above=0, help="angular frequency of the sine"),
    }

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        product = params["B"] @ params["A"]
        wave = (layer.settings["frequency"] * product).sin()
        return layer.scaling * (product + layer.settings["amplitude"] * product * wave)
