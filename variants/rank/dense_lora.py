"""DenseLoRA: layers of a type share encoder and decoder."""

from torch import Tensor
from torch.nn.functional import gelu

from variants import api


class DenseLoRA(api.SharedTensors, api.Variant):
    """y = x W^T + s gelu(gelu(x A^T) M^T B^T), with M (r, r) of one layer, and shared A (r, in), B (out, r).

    All layers whose names differ only in indices share A and B. r = `rank_factor` * rank, and
    s = alpha / rank. The update is not linear in x, so it cannot be merged.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), M from U(-1/sqrt(r), 1/sqrt(r)), B = 0, so y = x W^T.

    Defaults: at rank 8 and alpha 16, `rank_factor` 24 gives the survey's r = 192 with alpha 384.

    Source: `tuners/lora.py` of the authors' code (mulin-ahu/DenseLoRA), which has the two GELU.
    """

    paper = "Mu et al., arXiv 2505.23808"
    year = 2025
    deviations = """The authors' code also has dropout before M and after B. It never enables its layers,
    because two spellings of a flag differ."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"rank_factor": api.Int(24, help="size r of M, divided by the rank")}
    merge_obstacle = "its update is not linear in the input of the layer"

    def largest_rank(self, layer: api.FrozenLayer) -> int | None:
        return None

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        r = self.shared_rank(layer.settings)
        return api.InitialTensors({"M": random.kaiming("M", (r, r))})

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        a, b = self.own_part(params["A"], params["B"], layer)
        return {**params, "A": a, "B": b}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        a, m, b = (params[name].to(x.dtype).transpose(1, 2) for name in "AMB")
        return base + layer.scaling.to(x.dtype) * gelu(api.bmm(api.bmm(gelu(api.bmm(x, a)), m), b))
