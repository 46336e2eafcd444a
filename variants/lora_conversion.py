"""Conversion of a trained lane to a plain LoRA of a given rank, for programs that take no other adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.base import Variant
from variants.errors import MergeError, UnsupportedError
from variants.merging import bias_updates
from variants.variant_settings import AdaptationScope, VariantSettings

Norms = dict[str, tuple[float, float]]
"""Layer -> Frobenius norm of what the LoRA leaves out of the lane's update, and that of the update."""


def convert_to_lora(adapters: Adapters, lane: str, rank: int) -> tuple[Adapters, Norms]:
    """Replace the adapters by those of the variant `lora`, with one lane that has nearly the same update.

    In each layer, B A is the nearest matrix of this rank to the update W' - W, its truncated singular value
    decomposition (Eckart and Young 1936). The scale s of the LoRA is 1. Heads are kept as they are.

    Args:
        adapters: The adapters that hold the lane; they are detached.
        lane: The lane to convert, whose name the new lane gets.
        rank: The rank of the LoRA. Layers with a smaller side get rows and columns of zeros.

    Returns:
        The new adapters on the same model, and the norms of each layer, computed from the stored factors.

    Raises:
        MergeError: The lane changes more than weights of adapted layers, or an update is not a matrix.
        UnsupportedError: The rank is larger than the smaller side of every layer.
    """
    if reason := lora_obstacle(adapters.variant):
        raise MergeError(f"{adapters.variant.name} cannot be written as a LoRA: {reason}")
    limit = max(min(layer.frozen_layer.shape) for layer in adapters.layers.values())
    if rank > limit:
        raise UnsupportedError(f"rank {rank} is larger than any layer allows: at most {limit}")
    with torch.no_grad():
        for name, update in bias_updates(adapters, lane).items():
            if update.any():
                raise MergeError(f"{adapters.variant.name} also changes the bias of {name}; a LoRA cannot")
        trainable: dict[str, Tensor] = {}
        norms: Norms = {}
        for name, layer in adapters.layers.items():
            update = adapters.variant.delta_weight(layer.lane_tensors(lane), layer.lane_layer(lane)).double()
            a, b = _nearest_factors(update, rank)
            trainable |= {f"{name}.A": a, f"{name}.B": b}
            lost = torch.linalg.matrix_norm(update - b.double() @ a.double())
            norms[name] = lost.item(), torch.linalg.matrix_norm(update).item()
        for name, head in adapters.heads.items():
            own = head.own_tensors.lane_tensors(lane)
            trainable |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in own.items()}
    layers = {name: layer.base_layer for name, layer in adapters.layers.items()}
    heads = {name: head.base_layer for name, head in adapters.heads.items()}
    adapters.detach()
    variant = catalogue.get("lora")
    # Not by attach(), which refuses a rank that exceeds the smaller side of a single layer.
    settings = variant.validate_settings(VariantSettings(rank, float(rank)))
    converted = Adapters(adapters.model, variant, settings, layers, heads)
    converted.restore_lane(lane, trainable, {}, settings)
    return converted, norms


def lora_obstacle(variant: Variant) -> str:
    """Return why no lane of a variant can be written as a LoRA; empty if its updates are matrices."""
    has_adapter = variant.adaptation_scope is AdaptationScope.TARGET_LAYERS
    return variant.merge_obstacle or ("" if has_adapter else variant.peft_obstacle)


def _nearest_factors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) in float32, with the matrix of this rank nearest to the update.

    The singular vectors are the eigenvectors of the smaller product of the update, (out, in) float64, with
    its transpose. This takes a tenth of the time of a decomposition of the update.
    """
    is_wide = update.shape[0] <= update.shape[1]
    wide = update if is_wide else update.t()
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:]
    factors = vectors.new_zeros(rank, wide.shape[1]), vectors.new_zeros(wide.shape[0], rank)
    factors[0][: vectors.shape[1]] = vectors.t() @ wide
    factors[1][:, : vectors.shape[1]] = vectors
    a, b = factors if is_wide else (factors[1].t(), factors[0].t())
    return a.float().contiguous(), b.float().contiguous()
