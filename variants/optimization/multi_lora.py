"""MultiLoRA: parallel LoRAs with trainable scales of their outputs."""

from torch import Tensor

from variants import api


class MultiLoRA(api.LowRank):
    """W' = W + s sum_i diag(g_i) B_i A_i with s = alpha / rank; `rank` is the rank of each module i.

    Shapes: A (modules * rank, in) and B (out, modules * rank) hold the factors of all modules, and
    g (modules, out) holds one scale for each output of each module.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B from U(-1/sqrt(rank), 1/sqrt(rank)) (both
    Kaiming-uniform with a = sqrt(5)), g = 0, so W' = W.

    The adapter is exported as a plain LoRA of rank modules * rank.

    Source: src/adapter/multilora.py of pUmpKin-Co/MTL-LoRA, whose authors (Yang et al. 2024, arXiv
    2410.09437) compare with MultiLoRA; the default of 3 modules is theirs. No code of MultiLoRA's authors is
    known. The equations of MultiLoRA's paper are not confirmed: its scale may be one number per module.
    """

    paper = "Wang et al., arXiv 2311.11501"
    year = 2023
    hyperparameters = {"modules": api.Int(3, help="number of parallel LoRAs")}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        modules = layer.settings["modules"]
        a = random.kaiming("A", (modules * rank, in_features))
        b = random.kaiming("B", (out_features, modules * rank), fan_in=rank)
        return api.InitialTensors({"g": layer.zeros(modules, out_features), "A": a, "B": b})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        scales = params["g"].transpose(-1, -2).repeat_interleave(layer.settings.rank, dim=-1)
        return params["A"], params["B"] * scales
