"""A frozen linear layer that several lanes share, each with its own update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from variants.api import FrozenLayer, Params, Variant
from variants.forward_context import AdapterState, ForwardContext, check_rows, draw_dropout_masks
from variants.hooks import AuxiliaryLoss, DropoutOnBase, FrozenUpdate, FusesBase, GradientConstants
from variants.lane_tensors import LaneTensors
from variants.nf4 import NF4Linear
from variants.targets import view_layer


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
        self.own_tensors = LaneTensors(variant)
        self.layer_group = layer_group
        self._frozen_layer: FrozenLayer | None = None
        self._weight_version = (0, 0)
        # The two dictionaries hold for one `AdapterState.generation` and one frozen layer.
        self._cache_key: tuple[int, FrozenLayer] | None = None
        self._group_layers: dict[tuple[str, ...], FrozenLayer] = {}
        self._constants: dict[str, tuple[list[int], dict[str, Tensor]]] = {}
        self._fused = variant if isinstance(variant, FusesBase) and variant.is_fused else None

    @property
    def frozen_layer(self) -> FrozenLayer:
        """The frozen layer as variants see it; a new object after the weight was moved or written."""
        base = self._modules["base_layer"]  # the attribute would cost a microsecond
        assert base is not None
        stored = base._buffers["packed"] if isinstance(base, NF4Linear) else base._parameters["weight"]
        assert stored is not None
        version = stored.data_ptr(), stored._version
        if self._frozen_layer is None or self._weight_version != version:
            self._weight_version = version
            self._frozen_layer = view_layer(self.name, base)
        return self._frozen_layer

    def group_layer(self, lanes: tuple[str, ...]) -> FrozenLayer:
        """Return the frozen layer with the settings that K lanes share and the factor s of each."""
        layer, state = self.frozen_layer, self.adapter_state
        if (state.generation, layer) != self._cache_key:
            self._cache_key = state.generation, layer
            self._group_layers.clear()
            self._constants.clear()
        if (found := self._group_layers.get(lanes)) is None:
            settings = [state.settings[lane] for lane in lanes]
            # Training uses the factors too, which tensors made in inference mode would not permit. They are
            # filled on the device: for the copy of a tensor from the CPU, the host would wait for a GPU.
            with torch.inference_mode(False):
                scaling = torch.cat([layer.ones(1, 1, 1).fill_(self.variant.scaling(s)) for s in settings])
            shared = settings[0] if len(settings) == 1 else replace(settings[0], alpha=None)
            found = layer.with_settings(shared, scaling)
            self._group_layers[lanes] = found
        return found

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
        state, variant = self.adapter_state, self.variant
        context = state.current_context or state.get_context(self.name)
        context.called_layers.add(self.name)
        if not context.lanes or x.numel() == 0:
            return self.base_layer(x)
        check_rows(x, context, self.name)
        in_training, lanes = context.dropout_steps is not None, context.lanes
        layer = self.group_layer(lanes)
        if in_training and isinstance(variant, AuxiliaryLoss) and torch.is_grad_enabled():
            self._record_auxiliary_loss(variant, x, context, layer)
        dropout = layer.settings.dropout if in_training else 0.0
        fused = None if dropout else self._fused
        if fused is not None and fused.fuses(layer) and self._is_plain_product():
            return fused.forward_with_base(x, self._prepare_params(context, layer), layer)
        flat, base = x.reshape(len(lanes), -1, x.shape[-1]), self.base_layer(x)
        flat_base = base.reshape(len(lanes), -1, base.shape[-1])
        if not dropout:
            prepared = self._prepare_params(context, layer)
            return variant.forward(flat, flat_base, prepared, layer).view(base.shape)
        dropped = flat * draw_dropout_masks(flat, dropout, self.name, context, state.seeds)
        return self._forward_with_dropout(flat, dropped, flat_base, context, layer).view(base.shape)

    def _forward_with_dropout(
        self, x: Tensor, dropped: Tensor, base: Tensor, context: ForwardContext, layer: FrozenLayer
    ) -> Tensor:
        """Compute the lanes' outputs, (K, N, out): dropout applies to the input of the learned update alone.

        Args:
            x: The layer's input, (K, N, in).
            dropped: The input after dropout.
            base: The frozen layer's output for `x`, (K, N, out).
            context: The context of the call.
            layer: The layer with the lanes' settings.
        """
        variant, stacked = self.variant, self._stack_tensors(context.lanes)
        frozen_update: Params | None = None
        if isinstance(variant, FrozenUpdate) and (frozen := variant.frozen_update_buffers & stacked.keys()):
            frozen_update = variant.prepare_frozen_update(stacked, layer)
        if isinstance(variant, DropoutOnBase):
            dropped_base = self.base_layer(dropped)
            prepared = self._prepare_params(context, layer)
            change = variant.forward(dropped, dropped_base, prepared, layer) - dropped_base
            if frozen_update is not None:
                # `change` contains the frozen part for the dropped input, but that part has no dropout.
                base = variant.forward(x - dropped, base, frozen_update, layer)
            return base + change
        if frozen_update is None:
            return variant.forward(dropped, base, self._prepare_params(context, layer), layer)
        base = variant.forward(x, base, frozen_update, layer)
        learned = {name: tensor for name, tensor in stacked.items() if name not in frozen}
        return variant.forward(dropped, base, variant.prepare(learned, layer), layer)

    def _is_plain_product(self) -> bool:
        """Return whether the frozen layer computes x W^T + bias and nothing else.

        Otherwise it must be called: its class has a forward method of its own, or the layer has hooks.
        """
        base = self._modules["base_layer"]
        assert base is not None
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        if "forward" in vars(base):  # a method that was replaced on the object, as accelerate does
            return False
        forward = type(base).forward
        if forward in (nn.Linear.forward, NF4Linear.forward):
            return True
        # By name, because transformers need not be imported.
        return (forward.__module__, forward.__qualname__) == ("transformers.pytorch_utils", "Conv1D.forward")

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
        variant, kept = self.variant, self._constants
        if not isinstance(variant, GradientConstants):
            return self._stack_tensors(lanes)
        versions = {lane: self._versions((lane,)) for lane in lanes}
        stale = tuple(lane for lane in lanes if lane not in kept or kept[lane][0] != versions[lane])
        if stale:
            # Training uses them too, which tensors made in inference mode would not permit.
            with torch.inference_mode(False), torch.no_grad():
                tensors = variant.gradient_constants(self._stack_tensors(stale), self.group_layer(stale))
            for index, lane in enumerate(stale):
                kept[lane] = versions[lane], {name: t[index : index + 1] for name, t in tensors.items()}
        first, *others = (kept[lane][1] for lane in lanes)
        if others:
            first = {name: torch.cat([t, *(each[name] for each in others)]) for name, t in first.items()}
        return {**self._stack_tensors(lanes), **first}

    def _stack_tensors(self, lanes: tuple[str, ...]) -> Mapping[str, Tensor]:
        own = self.own_tensors.stack(lanes)
        return {**self.layer_group.stack(lanes), **own} if self.layer_group else own

    def _record_auxiliary_loss(
        self, variant: AuxiliaryLoss, x: Tensor, context: ForwardContext, layer: FrozenLayer
    ) -> None:
        x = x.reshape(len(context.lanes), context.rows_per_lane or 1, -1, x.shape[-1])
        attention_mask = x.new_ones(x.shape[:3])
        if context.attention_mask is not None and context.attention_mask.numel() == attention_mask.numel():
            attention_mask = context.attention_mask.view(attention_mask.shape).to(x.dtype)
        term = variant.auxiliary_loss(x, attention_mask, self._stack_tensors(context.lanes), layer)
        # A recomputation in the backward pass must not add the term a second time.
        context.auxiliary_losses.setdefault(self.name, term)
