"""DuDe: DoRA whose direction starts as PiSSA does."""

import torch

from variants import api
from variants.initialization.pissa import PiSSA
from variants.optimization.dora import DoRA


class DuDe(DoRA, PiSSA):
    """W' = (m / n) (W + s (B A - B0 A0)) with n = the row norms of the second factor, s = alpha / rank.

    Initialization: A = A0 and B = B0 from the `rank` largest singular triplets of W as in PiSSA, m = row
    norms of W as in DoRA, so W' = W. As in DoRA and PEFT, the gradient treats n as a constant.

    As in PEFT, dropout applies to W' - (W - s B0 A0), since the residual W - s B0 A0 is the frozen weight.

    Source: the paper's figure and PEFT, which can combine the two.
    """

    paper = "Han et al., arXiv 2505.14367"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION

    def prepare_frozen_update(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        frozen = super().prepare_frozen_update(params, layer)
        return {**frozen, "more": torch.zeros_like(frozen["B"][:, :, 0]).unsqueeze(1)}
