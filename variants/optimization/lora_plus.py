"""LoRA+: LoRA with a higher learning rate for B than for A."""

from variants import api


class LoRAPlus(api.RateScales, api.LowRank):
    """W' = W + s B A with s = alpha / rank; B's learning rate is `ratio` times the lane's, A's is the lane's.

    Initialization: as in LoRA, so W' = W. Default: `ratio` 16 is the survey's; the authors' code has none.

    Source: `create_loraplus_optimizer` of PEFT.
    """

    paper = "Hayou et al., arXiv 2402.12354"
    deviations = "In PEFT and in the authors' code, the biases of a trained head learn at B's rate too."
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {"ratio": api.Number(16.0, above=0, help="learning rate of B divided by that of A")}

    def parameter_lr_scale(self, parameter: str, settings: api.VariantSettings) -> float:
        return settings["ratio"] if parameter == "B" else 1.0
