"""OFT: rotates the layer's input in blocks of a fixed size."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from variants import api
from variants.linalg import cayley_change, multiply_blocks, nearest_divisor, neumann_change, skew_symmetric
from variants.maps import InputMap


class OFT(api.PeftFormat, InputMap):
    """W' = W R^T, that is, x W'^T = (x R) W^T; R is block-diagonal, and each block is a rotation (b, b).

    A block follows from a skew-symmetric Q, whose values above the diagonal learn: R = I + 2 Q + 2 Q^2 +
    2 Q^3 + Q^4 (OFTv2, arXiv 2506.19847; `terms` powers of Q), which is a rotation for small Q only, or
    R = (I - Q) (I + Q)^-1 without `cayley_neumann`. b is the divisor of `in` nearest to `block_size`.

    Initialization: Q = 0, so W' = W. Defaults: those of PEFT.

    Source: paper, Section 3; PEFT, tuners/oft/layer.py; github.com/Zeju1997/oft, oft-control/oft.py. For one
    Q, PEFT's two forms rotate in opposite directions. That is kept, so that adapters can be exchanged.
    """

    paper = "Qiu et al., arXiv 2306.07280"
    year = 2023
    deviations = """There is no constrained form (COFT, the default of the authors' oft-control), no re-scaled
    form (a factor for each output) and no Q that all blocks share. PEFT accepts a `module_dropout` for OFT
    and ignores it; there is none here. In PEFT before 0.18 the last term is 2 Q^4; its adapters with the
    series are refused."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "block_size": api.Int(32, minimum=2, help="inputs that are rotated together"),
        "cayley_neumann": api.Flag(True, help="power series in place of a matrix inverse"),
        "terms": api.Int(5, minimum=4, help="powers of Q in the series"),
    }
    uses_rank = uses_alpha = uses_dropout = False
    peft = api.PeftMethod(
        "OFT",
        {"Q": "oft_R.weight"},
        rank=None,
        alpha=None,
        dropout=None,
        fields={
            "block_size": "oft_block_size",
            "cayley_neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
        },
        constants={"coft": False, "block_share": False},
        adapts_conv1d=False,
    )

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        # PEFT warns about a series of an older version if its config does not name a version.
        return {**super().peft_config(settings), "peft_version": "0.18.0"}

    def settings_from_peft(self, config: Mapping[str, Any]) -> api.VariantSettings:
        # PEFT writes its version since 0.18, which changed the series.
        if config.get("use_cayley_neumann", True) and not config.get("peft_version"):
            raise api.UnsupportedError("PEFT before 0.18 made the adapter, with another series of rotations")
        return super().settings_from_peft(config)

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        in_features = layer.shape[1]
        size = nearest_divisor(in_features, layer.settings["block_size"])
        shape = in_features // size, size * (size - 1) // 2
        return api.InitialTensors({"Q": layer.zeros(*shape)})

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return R - I of each block, (K, in / b, b, b), as "change"."""
        q = params["Q"]
        skew = skew_symmetric(q, layer.shape[1] // q.shape[1])
        if layer.settings["cayley_neumann"]:
            change = neumann_change(skew.flatten(0, 1), layer.settings["terms"])
            return {"change": change.unflatten(0, skew.shape[:2])}
        return {"change": cayley_change(-skew)}

    def map_input(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return multiply_blocks(x, params["change"])
