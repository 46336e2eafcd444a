"""A model whose layers hold the tensors of several lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants.base import AdaptationScope, InitialTensors, Variant, VariantSettings, stable_seed
from variants.forward_context import AdapterState
from variants.full_finetune import FullModelParameters
from variants.heads import LaneHead
from variants.lane_linear import LaneLinear
from variants.lane_tensors import LaneTensors
from variants.module_swap import ModuleSwap

LAYER_GROUP_PREFIX = "group:"
"""Starts the owner's name of a layer group's tensors, also in checkpoints."""

CalibrationTensors = Mapping[str, Mapping[str, Tensor]]
"""Layer -> the result of the variant's `reduce_calibration`."""


class AdaptedModel:
    """A model whose target layers and heads hold the tensors of several lanes.

    The tensors of a lane belong to owners: an adapted layer, a head, a layer group, or a module of a model
    that is trained in full.

    Attributes:
        model: The model, with its target layers and heads replaced.
        variant: The rule by which the layers learn.
        state: What the adapted layers share.
        settings: What all lanes have in common (rank, dropout, extra settings).
        layers: The adapted layers by dotted path.
        heads: The task's linear layers by dotted path.
        layer_groups: Tensors that several layers share, by owner.
        full_model: The lane's copies of all parameters, for full fine-tuning only.
        tensors_by_owner: The tensors of all lanes, by owner.
    """

    def __init__(
        self,
        model: nn.Module,
        variant: Variant,
        settings: VariantSettings,
        target_layers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module] | None = None,
        base_dropout: bool = False,
    ) -> None:
        """Replace layers of the model, without the checks of `attach`.

        Args:
            model: The model.
            variant: The rule by which the layers learn.
            settings: Validated settings.
            target_layers: The layers to adapt by dotted path.
            heads: The task's linear layers by dotted path.
            base_dropout: Whether training applies the model's own dropout.
        """
        self.model, self.variant, self.settings = model, variant, settings
        self.state = AdapterState()
        self.state.dropout = settings.dropout
        self._layers_by_group: dict[str, list[str]] = {}
        for name in target_layers:
            if (group := variant.layer_group(name)) is not None:
                self._layers_by_group.setdefault(LAYER_GROUP_PREFIX + group, []).append(name)
        self.layer_groups = {
            name: LaneTensors(variant.mutable_buffers, variant.hook_only_buffers)
            for name in self._layers_by_group
        }
        group_of = {
            name: self.layer_groups[group] for group, names in self._layers_by_group.items() for name in names
        }
        self.layers = {
            name: LaneLinear(name, base, variant, self.state, group_of.get(name))
            for name, base in target_layers.items()
        }
        self.heads = {
            name: LaneHead(name, base, self.state)  # type: ignore[arg-type]  # attach() admits only Linear
            for name, base in (heads or {}).items()
        }
        wrappers: list[LaneLinear | LaneHead] = [*self.layers.values(), *self.heads.values()]
        self._module_swap = ModuleSwap(model, wrappers, self.state, base_dropout)
        self.full_model = None
        if variant.adaptation_scope is AdaptationScope.FULL_MODEL:
            self.full_model = FullModelParameters(model, {id(head) for head in self.heads.values()})
        self.tensors_by_owner: dict[str, LaneTensors] = {
            **{name: layer.own_tensors for name, layer in self.layers.items()},
            **self.layer_groups,
            **{name: head.own_tensors for name, head in self.heads.items()},
            **(self.full_model.tensors if self.full_model is not None else {}),
        }

    @torch.no_grad()
    def initial_tensors(
        self, settings: VariantSettings, seed: int, calibration: CalibrationTensors
    ) -> dict[str, InitialTensors]:
        """Return the initial tensors of a lane by owner.

        Args:
            settings: The lane's settings, with all defaults filled in.
            seed: The lane's seed.
            calibration: The result of `calibrate`; empty if the variant needs none.
        """
        layers = {
            name: replace(layer.frozen_layer, calibration=calibration.get(name, {}))
            for name, layer in self.layers.items()
        }

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(stable_seed(seed, name))

        initial = self.variant.init_layers(layers, settings, generator)
        for group, names in self._layers_by_group.items():
            members = {name: layers[name] for name in names}
            initial[group] = self.variant.init_layer_group(members, settings, generator(group))
        initial |= {name: InitialTensors(weights) for name, weights in self.init_heads(seed).items()}
        if self.full_model is not None:
            initial |= {owner: InitialTensors(copies) for owner, copies in self.full_model.init().items()}
        return initial

    def init_heads(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Return the initial weights of each head for a lane with this seed."""
        return {
            name: head.init(torch.Generator().manual_seed(stable_seed(seed, name)))
            for name, head in self.heads.items()
        }

    def device(self, owner: str) -> torch.device:
        """Return the device of an owner's tensors."""
        if owner in self.layers:
            return self.layers[owner].base_layer.weight.device  # type: ignore[return-value]  # a Tensor
        if owner in self._layers_by_group:
            return self.device(self._layers_by_group[owner][0])
        return next(self.model.parameters()).device

    def detach(self) -> None:
        """Restore the model bit for bit."""
        self._module_swap.undo()
