"""AuroRA: tanh and splines between LoRA's factors."""

import torch
from torch import Tensor

from variants import api


class AuroRA(api.Variant):
    """y = W x + s B f(A x) with f(z) = tanh(H tanh(z)) + C b(z) and s = alpha / rank.

    b(z) is the sum over the entries of z of the B-spline basis functions of degree `degree` on `intervals`
    equal intervals of [-1, 1]; it is zero for entries far outside.

    Shapes: A (rank, in), B (out, rank), H (rank, rank), C (rank, intervals + degree).

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), H from N(0, 1 / rank) (Xavier), C from U(-0.1, 0.1),
    B = 0, so y = W x.

    Defaults: cubic splines on 5 intervals; they and the start of H and C are those of the survey's code. The
    paper has no s and uses rank 2; use alpha = rank for s = 1.

    Source: the paper's equations 4 to 8.
    """

    paper = "Dong et al., arXiv 2505.18738"
    deviations = """The update depends on the input and cannot be merged; the paper (equation 3) and the
    survey's code merge B f(A), which is another function. In the paper C is a vector; its shape here is that
    of the survey's code. f is computed in float32 or float64, from A x in the model's dtype."""
    verified_by = api.VerifiedBy.PAPER
    hyperparameters = {
        "intervals": api.Int(5, help="intervals of the spline's grid on [-1, 1]"),
        "degree": api.Int(3, help="degree of the splines"),
    }
    merge_obstacle = "its update is not linear in the input of the layer"

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial, rank = random.lora(), layer.settings.rank
        splines = layer.settings["intervals"] + layer.settings["degree"]
        initial.trainable["H"] = random.normal("H", (rank, rank), rank**-0.5)
        initial.trainable["C"] = random.uniform("C", (rank, splines), 0.1)
        return initial

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        return {**params, "sB": params["B"] * layer.scaling}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        transposed = {name: params[name].transpose(1, 2) for name in ("A", "sB", "H", "C")}
        z = api.bmm(x, transposed["A"].to(x.dtype)).to(layer.dtype)
        splines = spline_basis(z, layer.settings["intervals"], layer.settings["degree"]).sum(2)
        fixed = api.bmm(z.tanh(), transposed["H"]).tanh()
        hidden = api.baddbmm(fixed, splines, transposed["C"])
        return api.baddbmm(base, hidden.to(x.dtype), transposed["sB"].to(x.dtype))


def spline_basis(z: Tensor, intervals: int, degree: int) -> Tensor:
    """Return the B-spline basis functions of each entry of z (...), as (..., intervals + degree).

    The knots are equally spaced: `intervals` intervals of [-1, 1] and `degree` further ones on each side. The
    Cox-de Boor recursion then needs only a knot's number.
    """
    position = ((z + 1) * intervals / 2 + degree).unsqueeze(-1)  # in intervals from the first knot
    knots = torch.arange(intervals + 2 * degree, device=z.device, dtype=z.dtype)
    basis = ((position >= knots) & (position < knots + 1)).to(z.dtype)
    for order in range(1, degree + 1):
        knots = knots[:-1]
        rising, falling = (position - knots) / order, (knots + order + 1 - position) / order
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis
