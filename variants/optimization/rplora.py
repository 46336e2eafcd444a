"""RPLoRA: LoRA whose gradients a Riemannian metric rescales."""

import torch

from variants import api


class RPLoRA(api.StepHooks, api.LowRank):
    """W' = W + s B A with s = alpha / rank; the optimizer gets preconditioned gradients.

    g_A is replaced by (B^T B + delta I)^-1 g_A, and g_B by g_B (A A^T + delta I)^-1.

    Initialization: as in LoRA, so W' = W.

    Source: `create_riemannian_optimizer` of PEFT, whose default `delta` is 0.01.
    """

    paper = "Zhang and Pilanci, arXiv 2402.02347"
    deviations = """PEFT takes pseudo-inverses; here a lane diverges if a matrix is singular in its dtype. The
    authors' AdamW computes the factor of g_B from the A that the same step has already updated, and their
    `delta` is 1e-6 for GPT-2, 4.5 for Mistral 7B and 0 for diffusion models."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {"delta": api.Number(0.01, above=0, help="added to the diagonals of B^T B and A A^T")}

    def before_step(self, lane: api.LaneView) -> None:
        pairs = [(view.trainable["A"], view.trainable["B"]) for view in lane.layers.values()]
        # One call inverts the matrices of all layers, because a call for each would take most of the time.
        products = torch.stack([product for a, b in pairs for product in (b.t() @ b, a @ a.t())])
        products.diagonal(dim1=1, dim2=2).add_(lane.settings["delta"])
        # `inv` would wait for the GPU, and raise for a singular matrix of one layer.
        inverses = torch.linalg.inv_ex(products).inverse.unbind()
        for (a, b), left, right in zip(pairs, inverses[::2], inverses[1::2], strict=True):
            if a.grad is not None:
                a.grad.copy_(left @ a.grad)
            if b.grad is not None:
                b.grad.copy_(b.grad @ right)
