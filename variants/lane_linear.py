"""A frozen linear layer that several lanes share, each with its own update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from variants.api import FrozenLayer, Params, Variant
from variants.forward_context import (
    AdapterState,
    ForwardContext,
    check_rows,
    draw_dropout_masks,
    split_by_lane,
)
from variants.lane_tensors import LaneTensors, stack_by_name
from variants.nf4 import NF4Linear
from variants.targets import is_plain_conv1d, view_layer


class LaneLinear(nn.Module):
    """Replacement of a frozen linear layer that adds each lane's update to the layer's output.

    Attributes:
        name: The dotted path of the layer in the model.
        base_layer: The frozen layer.
        variant: The rule by which the layer learns.
        adapter_state: The state that all adapted layers share.
        own_tensors: The lanes' tensors of this layer.
        layer_group: The lanes' tensors that this layer shares with others, or None.
    """

    def __init__(
        self,
        name: str,
        base_layer: nn.Module,
        variant: Variant,
        adapter_state: AdapterState,
        layer_group: LaneTensors | None = None,
    ) -> None:
        super().__init__()
        self.name, self.base_layer, self.variant = name, base_layer, variant
        self.adapter_state = adapter_state
        self.own_tensors = LaneTensors(variant.mutable_buffers, variant.hook_only_buffers)
        self.layer_group = layer_group
        self._frozen_layer: FrozenLayer | None = None
        self._weight_version = (0, 0)

    @property
    def frozen_layer(self) -> FrozenLayer:
        """The frozen layer as variants see it; a new object after the weight was moved or written."""
        base = self.base_layer
        # An nn.Module's attributes have no types.
        stored: Tensor = base.packed if isinstance(base, NF4Linear) else base.weight  # type: ignore[assignment]
        version = stored.data_ptr(), stored._version
        if self._frozen_layer is None or self._weight_version != version:
            self._weight_version = version
            self._frozen_layer = view_layer(self.name, base)
            self.own_tensors.gradient_constants.clear()
        return self._frozen_layer

    def group_layer(self, lanes: tuple[str, ...]) -> FrozenLayer:
        """Return the frozen layer with the settings that K lanes share and the factor s of each."""
        state, layer = self.adapter_state, self.frozen_layer
        scaling = state.scaling(self.variant, lanes, layer)
        return replace(layer, settings=state.group_settings, scaling=scaling)

    def lane_layer(self, lane: str) -> FrozenLayer:
        """Return the frozen layer with the settings and the factor s of one lane."""
        settings, layer = self.adapter_state.settings[lane], self.frozen_layer
        return layer.with_settings(settings, self.variant.scaling(settings))

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, for models that read its dtype or device; the context records it."""
        if self.adapter_state.current_context is not None:
            self.adapter_state.current_context.weight_reads.add(self.name)
        return self.base_layer.weight  # type: ignore[return-value]  # an nn.Module's attribute

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # bias, in_features, and others that models read

    def lane_tensors(self, lane: str) -> dict[str, Tensor]:
        """Return the tensors of one lane in this layer by name, with those that its layer group shares."""
        shared = self.layer_group.lane_tensors(lane) if self.layer_group else {}
        return {**shared, **self.own_tensors.lane_tensors(lane)}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer for the rows of the current context.

        Args:
            x: (K*R, ..., in).

        Returns:
            (K*R, ..., out).
        """
        context = self.adapter_state.get_context(self.name)
        context.called_layers.add(self.name)
        if not context.lanes or x.numel() == 0:
            return self.base_layer(x)
        check_rows(x, context, self.name)
        if context.dropout_steps is not None and self.variant.has_auxiliary_loss and torch.is_grad_enabled():
            self._record_auxiliary_loss(split_by_lane(x, context, self.name), context)
        has_dropout = context.dropout_steps is not None and self.adapter_state.group_settings.dropout > 0
        layer = self.group_layer(context.lanes)
        if not has_dropout and self.variant.includes_base(layer) and self._is_plain_product():
            return self.variant.forward_with_base(x, self._prepare_params(context, layer), layer)
        flat, base = split_by_lane(x, context, self.name), self.base_layer(x)
        flat_base = base.reshape(len(context.lanes), -1, base.shape[-1])
        if not has_dropout:
            return self._apply_variant(flat, flat_base, context).view(base.shape)
        state = self.adapter_state
        dropped = flat * draw_dropout_masks(
            flat, state.group_settings.dropout, self.name, context, state.seeds
        )
        if not self.variant.dropout_on_base:
            return self._apply_variant(dropped, flat_base, context, flat).view(base.shape)
        dropped_base = self.base_layer(dropped)
        change = self._apply_variant(dropped, dropped_base, context) - dropped_base
        if self.variant.frozen_update_buffers & self.lane_tensors(context.lanes[0]).keys():
            # `change` contains the frozen part for the dropped input, but that part has no dropout.
            update = self.variant.prepare_frozen_update(self._stack_tensors(context.lanes), layer)
            flat_base = self.variant.forward(flat - dropped, flat_base, update, layer)
        return (flat_base + change).view(base.shape)

    def _is_plain_product(self) -> bool:
        """Return whether the frozen layer computes x W^T + bias and nothing else.

        Otherwise it must be called: its class has a forward method of its own, or the layer has hooks.
        """
        base = self.base_layer
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        if "forward" in vars(base):  # a method that was replaced on the object, as accelerate does
            return False
        return type(base).forward in (nn.Linear.forward, NF4Linear.forward) or is_plain_conv1d(base)

    def _apply_variant(
        self, x: Tensor, base: Tensor, context: ForwardContext, x_before_dropout: Tensor | None = None
    ) -> Tensor:
        """Compute the lanes' outputs.

        Args:
            x: The layer's input, after dropout if there is any, (K, N, in).
            base: The frozen layer's output, (K, N, out).
            context: The context of the call.
            x_before_dropout: The input before dropout; None if the whole update reads `x`.

        Returns:
            (K, N, out).
        """
        lanes, layer, variant = context.lanes, self.group_layer(context.lanes), self.variant
        if x_before_dropout is not None and (
            frozen := variant.frozen_update_buffers & self.lane_tensors(lanes[0]).keys()
        ):
            stacked = self._stack_tensors(lanes)
            update = variant.prepare_frozen_update(stacked, layer)
            base = variant.forward(x_before_dropout, base, update, layer)
            unfrozen = {name: tensor for name, tensor in stacked.items() if name not in frozen}
            return variant.forward(x, base, variant.prepare(unfrozen, layer), layer)
        return variant.forward(x, base, self._prepare_params(context, layer), layer)

    def _prepare_params(self, context: ForwardContext, layer: FrozenLayer) -> Params:
        """Return the result of the variant's `prepare`.

        Without gradients, the last result is used again until a tensor of the lanes has changed.
        """
        lanes = context.lanes
        if torch.is_grad_enabled():
            return self.variant.prepare(self._stack_all(lanes), layer)
        versions = self._versions(lanes)
        cached = context.prepared_params.get(self.name)
        if cached is None or cached[0] != versions:
            cached = versions, self.variant.prepare(self._stack_all(lanes), layer)
            context.prepared_params[self.name] = cached
        return cached[1]

    def _versions(self, lanes: tuple[str, ...]) -> list[int]:
        """Return numbers that change with every in-place write of a tensor that the lanes use here."""
        own = self.own_tensors.versions(lanes)
        return own + self.layer_group.versions(lanes) if self.layer_group else own

    def _stack_all(self, lanes: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Return the tensors of K lanes and the variant's gradient constants for them, each (K, ...)."""
        if type(self.variant).gradient_constants is Variant.gradient_constants:
            return self._stack_tensors(lanes)
        kept = self.own_tensors.gradient_constants
        versions = {lane: self._versions((lane,)) for lane in lanes}
        stale = tuple(lane for lane in lanes if lane not in kept or kept[lane][0] != versions[lane])
        if stale:
            # Training uses them too, which tensors made in inference mode would not permit.
            with torch.inference_mode(False), torch.no_grad():
                tensors = self.variant.gradient_constants(self._stack_tensors(stale), self.group_layer(stale))
            for index, lane in enumerate(stale):
                kept[lane] = versions[lane], {name: t[index] for name, t in tensors.items()}
        constants = [kept[lane][1] for lane in lanes]
        return {**self._stack_tensors(lanes), **stack_by_name(constants)}

    def _stack_tensors(self, lanes: tuple[str, ...]) -> Mapping[str, Tensor]:
        own = self.own_tensors.stack(lanes)
        return {**self.layer_group.stack(lanes), **own} if self.layer_group else own

    def _record_auxiliary_loss(self, x: Tensor, context: ForwardContext) -> None:
        x = x.unflatten(1, (context.rows_per_lane or 1, -1))
        attention_mask = x.new_ones(x.shape[:3])
        if context.attention_mask is not None and context.attention_mask.numel() == attention_mask.numel():
            attention_mask = context.attention_mask.view(attention_mask.shape).to(x.dtype)
        params, layer = self._stack_tensors(context.lanes), self.group_layer(context.lanes)
        term = self.variant.auxiliary_loss(x, attention_mask, params, layer)
        # A recomputation in the backward pass must not add the term a second time.
        context.auxiliary_losses.setdefault(self.name, term)
