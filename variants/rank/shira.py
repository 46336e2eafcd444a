"""SHiRA: a random sparse subset of the weights learns."""

from torch import Tensor

from variants import api
from variants.linalg import fill_positions


class SHiRA(api.PeftFormat, api.DenseUpdate):
    """W' = W + S, where the sparse matrix S has rank * (in + out) trainable values, as many as LoRA.

    "indices" (2, values) are the rows and columns of the values in row-major order, drawn without
    replacement. There is no alpha.

    Initialization: the values are zero, so W' = W.

    The rule is PEFT's with its mask "random" (the paper's SHiRA-Rand). The paper's masks by magnitude,
    gradient or structure are not implemented.
    """

    paper = "Bhardwaj et al., arXiv 2406.13175"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_alpha = uses_dropout = False
    peft = api.PeftMethod(
        "SHIRA",
        {"values": "shira_weight", "indices": "shira_indices"},
        constants={"mask_type": "random"},
        adapts_conv1d=False,
    )

    def largest_rank(self, layer: api.FrozenLayer) -> int:
        out_features, in_features = layer.shape
        return out_features * in_features // (out_features + in_features)

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        count = layer.settings.rank * sum(layer.shape)
        return api.InitialTensors(
            {"values": layer.zeros(count)}, {"indices": random.positions("indices", count)}
        )

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return fill_positions(params["values"], params["indices"], layer.shape)
