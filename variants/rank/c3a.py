"""C3A: circular convolutions of blocks of the input."""

import math
from typing import Any

import torch
from torch import Tensor

from variants import api


class C3A(api.PeftFormat, api.Variant):
    """W' = W + [C(w_mn)] / in, a grid of circulant blocks (b, b) with C(w)[i, j] = w[(j - i) mod b].

    "w" is (out / b, in / b, b): w_mn (b,) defines the block in row m and column n of the grid. b is the
    greatest common divisor of `block_size`, in and out; a smaller b has more parameters. There is neither a
    rank nor an alpha.

    Initialization: w from U(-sqrt(6 / (in + out)), sqrt(6 / (in + out))) (Xavier), so W' differs from W.

    Rule, initialization and default are those of PEFT, which is the authors' code. The blocks are applied by
    FFT, in float32 or float64. PEFT recommends a learning rate of about 0.1.
    """

    paper = "Chen et al., arXiv 2407.19342"
    deviations = """PEFT refuses a layer whose sides `block_size` does not divide; an exported adapter names b
    for each such layer. PEFT's backward pass (0.21) has a wrong gradient of the layer's input, which the
    layers before it receive; here autograd computes it."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    start = api.Start.OTHER
    typical_lr_scale = 100.0
    uses_rank = uses_alpha = uses_dropout = False
    hyperparameters = {"block_size": api.Int(256, help="side of a circulant block")}
    peft = api.PeftMethod(
        "C3A", {"w": "c3a_kernel"}, fields={"block_size": "block_size"}, adapts_conv1d=False
    )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        block = math.gcd(layer.settings["block_size"], *layer.shape)
        shape = layer.shape[0] // block, layer.shape[1] // block, block
        return api.InitialTensors({"w": random.uniform("w", shape, math.sqrt(6 / sum(layer.shape)))})

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        # One lane at a time: the last bits of an FFT depend on the number of transforms in a call.
        lanes = zip(x.to(layer.dtype), params["w"], strict=True)
        update = torch.stack([_multiply(rows, w) for rows, w in lanes])
        return base + (update / layer.shape[1]).to(base.dtype)

    def peft_layer_fields(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Any]:
        return {"block_size": params["w"].shape[2]}


def _multiply(x: Tensor, w: Tensor) -> Tensor:
    """Return the products (N, out) of the circulant blocks with x (N, in)."""
    block = w.shape[2]
    pieces = torch.fft.rfft(x.unflatten(1, (-1, block))).permute(2, 0, 1)  # (b // 2 + 1, N, in / b)
    spectra = torch.fft.rfft(w).conj().permute(2, 1, 0)  # (b // 2 + 1, in / b, out / b)
    return torch.fft.irfft(torch.bmm(pieces, spectra).permute(1, 2, 0), n=block).flatten(1)
