"""MoLA: mixtures of LoRA experts, larger ones in later blocks."""

from torch import Tensor

from variants import api
from variants.mixture import BalancedMixture, init_experts

SHAPES = {"inverted_triangle": (2, 4, 6, 8), "triangle": (8, 6, 4, 2), "hourglass": (8, 2, 2, 8),
          "rectangle": (5, 5, 5, 5)}  # fmt: skip


class MoLA(api.InitTogether, api.RankAllocation, BalancedMixture):
    """y = W x + s sum_i g_i(x) B_i A_i x with the `top_k` largest gates of softmax(R x).

    The gates are scaled to a sum of 1, and s = alpha / rank, where `rank` is the rank of each expert.

    Shapes: A (experts * rank, in), B (out, experts * rank), R (experts, in). `shape` gives the number of
    experts in the quarters of the blocks, from the first block to the last: 2, 4, 6, 8 (inverted_triangle),
    8, 6, 4, 2 (triangle), 8, 2, 2, 8 (hourglass) or 5 everywhere (rectangle). A layer's block is the first
    number in its name; a layer without a number counts as one of the last block.

    Initialization: A and R from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so y = W x.

    Defaults: inverted_triangle and top 2, as in the official commands; weight 0.001 of the balancing loss, as
    in the official code, where mola_training.py leaves the loss out by default (`balance` 0) and
    mola_training_instruction.py does not. The loss is experts * sum_i f_i P_i, where f_i is the share of the
    selections that fall on expert i and P_i is the mean of its probabilities.

    Source: src/mola_lora_hacked.py and src/mola_modeling_llama_hacked.py of GCYZSL/MoLA.
    """

    paper = "Gao et al., arXiv 2402.08562"
    deviations = """See `Mixture`. Each layer has its own balancing loss, where the official code has one of
    all adapted layers of a block together, which can be at its minimum although each uses only two experts.
    """
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "shape": api.Choice("inverted_triangle", tuple(SHAPES), help="numbers of experts by depth"),
        "top_k": api.Int(2, maximum=2, help="experts per token"),
        "balance": api.Number(1e-3, help="weight of the balancing loss"),
    }
    shares_rank = has_exact_budget = False  # a layer's rank depends on its name

    def expert_count(self, settings: api.VariantSettings) -> int:
        """Return the number of experts of the smallest layers."""
        return min(SHAPES[settings["shape"]])

    def rank_in_use(self, params: api.Params, settings: api.VariantSettings) -> int:
        return len(params["A"])  # of all experts together

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        settings = api.shared_settings(layers)
        blocks = {name: _block(name) for name in layers}
        count = 1 + max((block for block in blocks.values() if block is not None), default=0)
        initial = {}
        for name in layers:
            block = count - 1 if (found := blocks[name]) is None else found
            experts = SHAPES[settings["shape"]][4 * block // count]
            initial[name] = init_experts(random_of(name), experts, experts * settings.rank)
        return initial

    def imbalance(
        self, gates: Tensor, probabilities: Tensor, mask: Tensor, settings: api.VariantSettings
    ) -> Tensor:
        return super().imbalance(gates, probabilities, mask, settings) / settings["top_k"]


def _block(layer_name: str) -> int | None:
    return next((int(part) for part in layer_name.split(".") if part.isdigit()), None)
