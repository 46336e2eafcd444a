"""A model whose layers hold the tensors of several lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants.api import AdaptationScope, InitialTensors, Variant, VariantSettings
from variants.base_dropout import LaneDropout, TableDropout
from variants.forward_context import AdapterState
from variants.full_finetune import FullModelParameters
from variants.heads import LaneHead
from variants.hooks import InitTogether, SharedTensors
from variants.lane_linear import LaneLinear
from variants.lane_tensors import LaneTensors
from variants.layer_random import LayerRandom
from variants.seeds import stable_seed

LAYER_GROUP_PREFIX = "group:"
"""Prefix of the owner's name of a layer group's tensors, also in checkpoints."""

CalibrationTensors = Mapping[str, Mapping[str, Tensor]]
"""Layer -> the result of the variant's `reduce_calibration`."""


class AdaptedModel:
    """A model whose target layers and heads hold the tensors of several lanes.

    The tensors of a lane belong to owners: an adapted layer, a head, a layer group, or a module of a model
    that is trained in full.

    Attributes:
        model: The model, with its target layers and heads replaced.
        variant: The rule by which the layers learn.
        state: State that the adapted layers share.
        settings: Settings that all lanes share (rank, dropout, extra settings).
        layers: The adapted layers by dotted path.
        heads: The task's linear layers by dotted path.
        layer_groups: Tensors that several layers share, by owner.
        full_model: The lane's copies of all parameters outside the heads; None without full fine-tuning.
        tensors_by_owner: The tensors of all lanes, by owner.
    """

    def __init__(
        self,
        model: nn.Module,
        variant: Variant,
        settings: VariantSettings,
        target_layers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        base_dropout: bool = False,
    ) -> None:
        """Replace layers of the model, without the checks of `attach`.

        Args:
            model: The model.
            variant: The rule by which the layers learn.
            settings: Validated settings.
            target_layers: The layers to adapt by dotted path.
            heads: The task's linear layers by dotted path.
            base_dropout: True to apply the model's own dropout in training.
        """
        self.model, self.variant, self.settings = model, variant, settings
        self.state = AdapterState()
        self.state.group_settings = replace(settings, alpha=None)
        self.layers: dict[str, LaneLinear] = {}
        self.layer_groups: dict[str, LaneTensors] = {}
        for name, base in target_layers.items():
            shared = None
            if isinstance(variant, SharedTensors):
                group = LAYER_GROUP_PREFIX + variant.layer_group(name)
                shared = self.layer_groups.setdefault(group, LaneTensors(variant))
            self.layers[name] = LaneLinear(name, base, variant, self.state, shared)
        self.heads = {
            name: LaneHead(name, base, self.state)  # type: ignore[arg-type]  # attach() admits only Linear
            for name, base in heads.items()
        }
        self._replaced_modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._original_requires_grad: list[tuple[nn.Parameter, bool]] = []
        self._attention_modules: list[nn.Module] = []
        self._replace_modules(base_dropout)
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
            name: replace(layer.frozen_layer, calibration=calibration.get(name, {}), settings=settings)
            for name, layer in self.layers.items()
        }

        def random_of(name: str) -> LayerRandom:
            return LayerRandom(layers[name], stable_seed(seed, name))

        variant = self.variant
        if isinstance(variant, InitTogether):
            initial = variant.init_layers(layers, random_of)
        else:
            initial = {name: variant.init(layer, random_of(name)) for name, layer in layers.items()}
        for owner, shared in self.layer_groups.items():
            members = {name: layers[name] for name, each in self.layers.items() if each.layer_group is shared}
            random = LayerRandom(next(iter(members.values())), stable_seed(seed, owner))
            assert isinstance(variant, SharedTensors)  # only such a variant has groups
            initial[owner] = variant.init_layer_group(members, random)
        initial |= {name: InitialTensors(weights) for name, weights in self.init_heads(seed).items()}
        if self.full_model is not None:
            initial |= {owner: InitialTensors(copies) for owner, copies in self.full_model.init().items()}
        return initial

    def init_heads(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Return the initial weights of each head for a lane with this seed."""
        return {name: head.init(stable_seed(seed, name)) for name, head in self.heads.items()}

    def detach(self) -> None:
        """Restore the model's own modules and flags; a second call has no effect."""
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = child
        for parameter, required in self._original_requires_grad:
            parameter.requires_grad_(required)
        for module in self._attention_modules:
            del module.lane_dropout
            module.training = False
        self._replaced_modules, self._original_requires_grad, self._attention_modules = [], [], []

    def _replace_modules(self, base_dropout: bool) -> None:
        """Put the lanes' modules into the model in place of its own, and freeze its parameters."""
        wrappers = (*self.layers.values(), *self.heads.values())
        replacements: dict[int, nn.Module] = {id(wrapper.base_layer): wrapper for wrapper in wrappers}
        if base_dropout:
            for name, module in list(self.model.named_modules()):
                if isinstance(module, nn.Dropout) and module.p > 0:
                    is_table = isinstance(module, TableDropout)
                    replacements[id(module)] = LaneDropout(name, module.p, self.state, is_table)
                if hasattr(module, "is_causal"):  # an attention module of transformers
                    module.lane_dropout = LaneDropout(f"{name}.probabilities", 0.0, self.state)
                    module.training = True  # otherwise it passes dropout 0 to its attention function
                    self._attention_modules.append(module)
        # A module may have several parents (tied layers): it is replaced in all of them.
        self._replaced_modules = [
            (parent, key, child)
            for parent in self.model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in replacements
        ]
        for parent, key, child in self._replaced_modules:
            parent._modules[key] = replacements[id(child)]
        self._original_requires_grad = [(each, each.requires_grad) for each in self.model.parameters()]
        self.model.requires_grad_(False)
