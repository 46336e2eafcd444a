"""MiLoRA: LoRA from the smallest singular triplets of the weight."""

from variants import api
from variants.initialization.pissa import PiSSA


class MiLoRA(PiSSA):
    """W' = W + s (B A - B0 A0) with s = alpha / rank; W - s B0 A0 is the paper's frozen principal part.

    Initialization: with the `rank` smallest triplets of W = U S V^T (of the min(in, out) triplets of the thin
    SVD), B = B0 = U sqrt(S / s) and A = A0 = sqrt(S / s) V^T, so W' = W.

    The SVD is always exact: a randomized SVD finds the largest triplets only. (The survey's code
    has one, and takes the largest triplets with U and V exchanged.) The authors use alpha = rank.

    Source: `initialize_lora_layer` with the mode "min" in the authors' svd_init.py.
    """

    paper = "Wang et al., arXiv 2406.09044"
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {}
    smallest = True
