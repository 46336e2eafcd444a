"""BOFT: OFT with butterfly factors, and a gain for each output."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import cayley_change, multiply_blocks
from variants.maps import InputMap


class BOFT(api.PeftFormat, InputMap):
    """W' = diag(s) W R^T with R = B_m ... B_1, that is, x W'^T = (x R W^T) diag(s).

    A product of sparse rotations is a dense rotation with few parameters.

    B_i = P_i D_i P_i^T. D_i is block-diagonal with rotations (I - Q) (I + Q)^-1 of size b = `block_size`,
    where Q = (M - M^T) / 2 and M (b, b) learns. P_i permutes the inputs within groups of b 2^(i-1): of the
    parts of b / 2 inputs in a group, those with even numbers come first. m is `factors`; for m = 1, BOFT is
    OFT with the gains s (out, 1).

    Initialization: M = 0 and s = 1, so W' = W. Defaults: those of PEFT (b = 4, m = 1). The paper's
    experiments have m > 1.

    PEFT needs a CUDA extension for m > 1; without it, PEFT takes m = 1, but its config still names the
    larger m. Such an adapter is refused.

    Source: paper, Section 4; PEFT, tuners/boft/layer.py.
    """

    paper = "Liu et al., arXiv 2311.06243"
    year = 2023
    deviations = "There is no multiplicative dropout (0 is PEFT's default)."
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "block_size": api.Int(4, minimum=2, help="size of the rotations"),
        "factors": api.Int(1, help="number of butterfly factors"),
    }
    uses_rank = uses_alpha = uses_dropout = False
    peft = api.PeftMethod(
        "BOFT",
        {"M": "boft_R", "s": "boft_s"},
        rank=None,
        alpha=None,
        dropout=None,
        adapts_conv1d=False,
        fields={"block_size": "boft_block_size", "factors": "boft_n_butterfly_factor"},
    )

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["factors"] > 1 and settings["block_size"] % 2:
            raise api.UnsupportedError(
                f"block_size {settings['block_size']}: must be even for more than one factor"
            )

    def check_layer(self, layer: api.FrozenLayer) -> None:
        in_features = layer.shape[1]
        size, factors = layer.settings["block_size"], layer.settings["factors"]
        if in_features % (size << (factors - 1)):
            raise api.UnsupportedError(
                f"{layer.name} has {in_features} inputs: not a multiple of {size << (factors - 1)}, which "
                f"block_size {size} and {factors} factors need"
            )

    def init_from_peft(self, tensors: api.Params, settings: api.VariantSettings) -> api.InitialTensors:
        stored, factors = len(tensors["boft_R"]), settings["factors"]
        if stored != factors:
            raise api.UnsupportedError(
                f"the adapter has {stored} of the {factors} butterfly factors that its config names"
            )
        return super().init_from_peft(tensors, settings)

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        size, (out_features, in_features) = layer.settings["block_size"], layer.shape
        gains = layer.ones(out_features, 1)
        return api.InitialTensors(
            {"M": gains.new_zeros(layer.settings["factors"], in_features // size, size, size), "s": gains}
        )

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return D_i - I as "change", (K, m, in / b, b, b), and s - 1 as "gain", (K, 1, out)."""
        m = params["M"]
        return {"change": cayley_change((m.mT - m) / 2), "gain": (params["s"] - 1).transpose(1, 2)}

    def map_input(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        half, change = layer.settings["block_size"] // 2, torch.zeros_like(x)
        for factor in reversed(range(layer.settings["factors"])):
            mapped = x + change
            if factor == 0:
                change = change + multiply_blocks(mapped, params["change"][:, 0])
                continue
            count = 2**factor
            sorted_parts = mapped.reshape(*x.shape[:2], -1, 2, count, half).transpose(-3, -2).reshape(x.shape)
            product = multiply_blocks(sorted_parts, params["change"][:, factor])
            change = change + product.view(*x.shape[:2], -1, count, 2, half).transpose(-3, -2).reshape(
                x.shape
            )
        return change

    def map_product(self, product: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return product * params["gain"]
