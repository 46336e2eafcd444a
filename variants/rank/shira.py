"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): a random sparse subset of the weights learns."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Params,
    PeftMethod,
    UnsupportedError,
    VerifiedBy,
    parameter_generator,
)
from variants.dense_update import DenseUpdate
from variants.initializers import distinct_init


class SHiRA(DenseUpdate):
    """W' = W + S, where the sparse matrix S has rank * (in + out) trainable values, as many as LoRA.

    "indices" (2, values) are the rows and columns of the values in row-major order, drawn without
    replacement. There is no alpha.

    Initialization: the values are zero, so W' = W.

    The rule is PEFT's with its mask "random" (the paper's SHiRA-Rand). The paper's masks by magnitude,
    gradient or structure are not implemented.
    """

    parameters = "rank * (in + out)"
    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    is_rank_limited_by_layer = False
    uses_alpha = False
    uses_dropout = False
    peft = PeftMethod(
        "SHIRA",
        {"values": "shira_weight", "indices": "shira_indices"},
        alpha=None,
        dropout=None,
        constants={"mask_type": "random"},
        adapts_conv1d=False,
    )

    def check_layer(self, layer: FrozenLayer) -> None:
        out_features, in_features = layer.shape
        rank, limit = layer.settings.rank, in_features * out_features
        count = rank * (in_features + out_features)
        if count > limit:
            raise UnsupportedError(
                f"{layer.name}: rank {rank} needs {count} values, but the layer has {limit} weights"
            )

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        out_features, in_features = layer.shape
        noise = parameter_generator(generator, "indices")
        count = layer.settings.rank * (in_features + out_features)
        chosen = distinct_init(count, out_features * in_features, noise)
        indices = torch.stack([chosen // in_features, chosen % in_features]).int()
        values = torch.zeros(count, dtype=layer.dtype, device=layer.device)
        return InitialTensors({"values": values}, {"indices": indices.to(layer.device)})

    def matrix(self, params: Params, layer: FrozenLayer) -> Tensor:
        rows, columns = params["indices"].long().unbind(1)
        flat = params["values"].new_zeros(len(rows), layer.shape[0] * layer.shape[1])
        return flat.scatter(1, rows * layer.shape[1] + columns, params["values"]).view(-1, *layer.shape)
