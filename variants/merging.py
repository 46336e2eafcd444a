"""Merging of a trained lane into the weights of the base model."""

from __future__ import annotations

import torch
from torch import Tensor

from variants.adapters import Adapters
from variants.errors import MergeError
from variants.nf4 import NF4Linear


def merge_and_detach(adapters: Adapters, lane: str) -> None:
    """Add a lane's update to the base weights, copy its head over the model's head, and detach the adapters.

    The sum is computed in float32 or float64 and then cast to the dtype of the weight.

    Args:
        adapters: The adapters; `lane` must be the only lane on them.
        lane: The lane to merge.

    Raises:
        MergeError: The variant has no such update, the update changes the bias of a layer without one,
            another lane uses the base model, or a weight is tied to a module that would change with it or is
            quantized. In the latter four cases nothing has changed.
    """
    _check_mergeable(adapters, lane)
    with torch.no_grad():
        biases = _bias_updates(adapters, lane)
        for name, layer in adapters.layers.items():
            view = layer.lane_layer(lane)
            _add(view.weight, adapters.variant.delta_weight(layer.lane_tensors(lane), view))
            if name in biases and view.bias is not None:
                _add(view.bias, biases[name])
        for head in adapters.heads.values():
            for name, trained in head.own_tensors.trainable[lane].items():
                getattr(head.base_layer, name).copy_(trained)
    if adapters.full_model is not None:
        adapters.full_model.copy_to_model(lane)
    adapters.detach()


def _bias_updates(adapters: Adapters, lane: str) -> dict[str, Tensor]:
    """Return the change of each layer's bias, before anything is written.

    Raises:
        MergeError: The bias of a layer that has none would change.
    """
    updates = {}
    for name, layer in adapters.layers.items():
        view = layer.lane_layer(lane)
        update = adapters.variant.delta_bias(layer.lane_tensors(lane), view)
        if update is None:
            continue
        if view.bias is None and update.any():
            raise MergeError(
                f"{adapters.variant.name} cannot be merged into {name}, which has no bias to change"
            )
        updates[name] = update
    return updates


def _add(tensor: Tensor, delta: Tensor) -> None:
    """Add to a tensor of the base model in place; the sum is computed in the wider of the two dtypes."""
    tensor.copy_((tensor.to(torch.promote_types(tensor.dtype, delta.dtype)) + delta).to(tensor.dtype))


def _check_mergeable(adapters: Adapters, lane: str) -> None:
    if not adapters.variant.is_mergeable:
        raise MergeError(f"{adapters.variant.name} cannot be merged: its update is not a matrix")
    for other in adapters.lanes:
        if other != lane:
            raise MergeError(
                f"lane {lane} cannot be merged while {other} uses the same base; remove it first"
            )
    for adapted in adapters.layers.values():
        if isinstance(adapted.base_layer, NF4Linear):
            raise MergeError(
                f"{adapters.variant.name} cannot be merged into {adapted.name}, which has 4 bits per value "
                "(nf4); export the adapter and merge it into the 16-bit model"
            )
    layers = {id(layer.base_layer.weight): layer for layer in adapters.layers.values()}
    for path, module in adapters.model.named_modules():
        for parameter in module._parameters.values():
            owner = layers.get(id(parameter))
            if owner is not None and owner.base_layer is not module:
                raise MergeError(f"{owner.name} shares its weight with {path}: it cannot be merged")
