"""Merging of a trained lane into the weights of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from variants.adapters import Adapters
from variants.errors import MergeError
from variants.hooks import BiasUpdate
from variants.lane_linear import LaneLinear
from variants.nf4 import NF4Linear


def merge_and_detach(adapters: Adapters, lane: str) -> None:
    """Write a lane into the base model, and detach the adapters: the model then computes what the lane did.

    A model of transformers is then a plain one, for its `save_pretrained` and `from_pretrained`.
    - The update is added to the weight in float32 or float64, and the sum is cast to the dtype of the weight.
    - Layers of 4 bits (nf4), also those without an adapter, become linear layers in the dtype that they
      compute in: the sum of the dequantized weight and the update is not quantized again.
    - The lane's head replaces the model's, in the dtype of the rest of the model.
    - If the output layer has an adapter and shares its weight with the input embeddings, it gets a weight of
      its own, and the model's config says so (`tie_word_embeddings`).

    Args:
        adapters: The adapters; `lane` must be the only lane on them.
        lane: The lane to merge.

    Raises:
        MergeError: The variant's updates are no matrices, an update changes the bias of a layer without one,
            another lane uses the base model, or a weight is shared with a module that would change with it:
            in these cases nothing has changed. Or the update of a single layer is not a matrix: the layers
            before it have then been changed.
    """
    tied = _check_mergeable(adapters, lane)
    dequantized: dict[int, nn.Linear] = {}
    with torch.no_grad():
        biases = bias_updates(adapters, lane)
        for layer in tied:
            _untie(adapters.model, layer)
        for name, layer in adapters.layers.items():
            view, base = layer.lane_layer(lane), layer.base_layer
            update = adapters.variant.delta_weight(layer.lane_tensors(lane), view)
            if isinstance(base, NF4Linear):
                dequantized[id(base)] = base.to_linear(_sum(view.weight, update))
            else:
                view.weight.copy_(_sum(view.weight, update))
            if name in biases and view.bias is not None:
                view.bias.copy_(_sum(view.bias, biases[name]))
        for head in adapters.heads.values():
            for name, trained in head.own_tensors.trainable[lane].items():
                getattr(head.base_layer, name).copy_(trained)
    adapters.full_model.copy_to_model(lane)
    adapters.detach()
    _replace_nf4(adapters.model, dequantized)
    _cast_heads(adapters.model, tuple(adapters.heads))


def bias_updates(adapters: Adapters, lane: str) -> dict[str, Tensor]:
    """Return layer -> change of its bias, for the layers whose bias the variant changes.

    Raises:
        MergeError: The bias of a layer that has none would change.
    """
    updates: dict[str, Tensor] = {}
    variant = adapters.variant
    if not isinstance(variant, BiasUpdate):
        return updates
    for name, layer in adapters.layers.items():
        view = layer.lane_layer(lane)
        update = variant.delta_bias(layer.lane_tensors(lane), view)
        if update is None:
            continue
        if view.bias is None and update.any():
            raise MergeError(
                f"{adapters.variant.name} cannot be merged into {name}, which has no bias to change"
            )
        updates[name] = update
    return updates


def _sum(tensor: Tensor, update: Tensor) -> Tensor:
    """Return the sum, computed in the wider of the two dtypes, in the dtype of `tensor`."""
    return (tensor.to(torch.promote_types(tensor.dtype, update.dtype)) + update).to(tensor.dtype)


def _check_mergeable(adapters: Adapters, lane: str) -> list[LaneLinear]:
    """Check everything that can be checked before a tensor is written.

    Returns:
        The adapted layers that must get a weight of their own.

    Raises:
        MergeError: The lane cannot be merged.
    """
    variant = adapters.variant
    if variant.merge_obstacle:
        raise MergeError(f"{variant.name} cannot be merged: {variant.merge_obstacle}")
    for other in adapters.lanes:
        if other != lane:
            raise MergeError(
                f"lane {lane} cannot be merged while {other} uses the same base; remove it first"
            )
    tied = []
    owners = {
        id(layer.base_layer.weight): layer
        for layer in adapters.layers.values()
        if not isinstance(layer.base_layer, NF4Linear)
    }
    for path, module in adapters.model.named_modules():
        for parameter in module._parameters.values():
            owner = owners.get(id(parameter))
            if owner is None or owner.base_layer is module:
                continue
            if not _are_embeddings(adapters.model, owner, module):
                raise MergeError(f"{owner.name} shares its weight with {path}: it cannot be merged")
            tied.append(owner)
    return tied


def _are_embeddings(model: Any, layer: LaneLinear, module: nn.Module) -> bool:
    """Return whether these are the output layer and the input embeddings of a model of transformers."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    return model.get_output_embeddings() is layer and model.get_input_embeddings() is module


def _untie(model: Any, layer: LaneLinear) -> None:
    """Give the output layer a weight of its own, which stays its own when the model is saved and loaded."""
    weight: Tensor = layer.base_layer.weight  # type: ignore[assignment]  # an nn.Module's attribute
    layer.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    for each in (model.config, model.config.get_text_config()):
        each.tie_word_embeddings = False
    # The names that transformers would not save, because it would tie them again.
    getattr(model, "all_tied_weights_keys", {}).pop(f"{layer.name}.weight", None)


def _replace_nf4(model: nn.Module, merged: Mapping[int, nn.Linear]) -> None:
    """Replace every 4-bit layer by a plain linear layer.

    Args:
        model: The model, without adapters.
        merged: `id` of a 4-bit layer -> the layer that replaces it. All others are dequantized.
    """
    layers = dict(merged)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, NF4Linear):
                if id(child) not in layers:
                    layers[id(child)] = child.to_linear()
                parent._modules[key] = layers[id(child)]  # a layer may have several parents


def _cast_heads(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Cast the heads to the dtype of the rest of the model, which may be narrower than theirs.

    Args:
        model: The model, without adapters.
        heads: The paths of the layers that were trained as heads.
    """
    prefixes = tuple(f"{name}." for name in heads)
    others = (
        each.dtype
        for name, each in model.named_parameters()
        if each.is_floating_point() and not name.startswith(prefixes)
    )
    dtype = next(others, None)
    for name in heads if dtype is not None else ():
        parent = model.get_submodule(name.rpartition(".")[0])
        # A norm beside the layer belongs to the head as well; the base model has a ModuleList of blocks.
        is_head = parent is not model and not any(isinstance(m, nn.ModuleList) for m in parent.modules())
        (parent if is_head else model.get_submodule(name)).to(dtype)
