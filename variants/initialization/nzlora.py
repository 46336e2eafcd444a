"""NZLoRA: LoRA with both A and B random at the start."""

import math

from variants import api


class NZLoRA(api.LowRank):
    """W' = W + s B A with s = alpha / rank.

    Initialization: A from U(-a, a) and B from U(-b, b) with a = sqrt(`gamma_a` / in) and
    b = sqrt(`gamma_b` / in), so W' differs from W by the noise s B A. `in` is the layer's in both bounds.
    With `bound` "linear", a = `gamma_a` / sqrt(in) and b likewise. With `subtract`, training starts at W:
    W' = W + s (B A - B0 A0), where A0 and B0 are the initial values.

    The default gamma of 1 makes A as in LoRA. The survey used 16 for both and the bound "sqrt",
    according to its code, or "linear" according to its text.

    Source: equation 89 ("linear") and the code ("sqrt" and `subtract`) of the survey, which gave the
    method this name (its authors: Init[AB]). The bounds in the authors' own paper and code were
    not available for comparison.
    """

    paper = "Li et al., arXiv 2505.23194"
    verified_by = api.VerifiedBy.PAPER  # the survey's paper
    hyperparameters = {
        "gamma_a": api.Number(1.0, above=0, help="scale of the initial A"),
        "gamma_b": api.Number(1.0, above=0, help="scale of the initial B"),
        "bound": api.Choice("sqrt", ("sqrt", "linear"), help="sqrt(gamma / in) or gamma / sqrt(in)"),
        "subtract": api.Flag(False, help="subtract the initial product from W"),
    }
    start = api.Start.OTHER

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        trainable = {}
        for name, shape in {"A": (rank, in_features), "B": (out_features, rank)}.items():
            gamma = layer.settings[f"gamma_{name.lower()}"]
            scale = math.sqrt(gamma) if layer.settings["bound"] == "sqrt" else gamma
            trainable[name] = random.uniform(name, shape, scale / math.sqrt(in_features))
        copies = {f"{name}0": tensor for name, tensor in trainable.items()}
        return api.InitialTensors(trainable, copies if layer.settings["subtract"] else {})
