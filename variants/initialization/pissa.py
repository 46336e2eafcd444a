"""PiSSA: LoRA from the largest singular triplets of the weight."""

from variants import api
from variants.linalg import WeightSVD
from variants.low_rank import start_from


class PiSSA(WeightSVD):
    """W' = W + s (B A - B0 A0) with s = alpha / rank; W - s B0 A0 is the paper's residual weight.

    Initialization: with the `rank` largest triplets of W = U S V^T, B = B0 = U sqrt(S / s) and
    A = A0 = sqrt(S / s) V^T, so W' = W.

    The paper writes the residual into W. Here A0 and B0 are frozen tensors beside it, which is exact in
    bfloat16 and needs one base model for all lanes. Dropout does not apply to the residual. With a number as
    `svd`, the SVD is PEFT's `pissa_niter_N` with 10 more columns, which is more accurate. The authors'
    scripts use `svd` 16, alpha = rank and no dropout.
    """

    paper = "Meng et al., arXiv 2404.02948"
    year = 2024
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        u, s, vh = self.triplets(layer)
        root = (s / self.scaling(layer.settings)).sqrt()
        return start_from(root.unsqueeze(1) * vh, u * root)
