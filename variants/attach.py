"""Attachment of a variant's adapters to a model: choice of layers and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from variants.adapted_model import CalibrationTensors
from variants.adapters import Adapters
from variants.api import AdaptationScope, FrozenLayer, Int, UnsupportedError, Variant, VariantSettings
from variants.heads import LaneHead
from variants.lane_linear import LaneLinear
from variants.nf4 import NF4Linear
from variants.targets import find_target_layers, view_layer

__all__ = ["Adapters", "CalibrationTensors", "attach"]


def attach(
    model: nn.Module,
    variant: Variant,
    settings: VariantSettings,
    targets: str = "blocks",
    heads: Sequence[str] = (),
    base_dropout: bool = False,
) -> Adapters:
    """Replace the model's target layers by layers that K lanes share, and freeze the model.

    The model must be on its device already.

    Args:
        model: The model, without adapters.
        variant: The rule by which the layers learn.
        settings: Settings that all lanes share (rank, dropout, extra settings). The alpha is checked and
            otherwise unused.
        targets: The layers to adapt, as `find_target_layers` takes them.
        heads: Names of the modules that belong to the task. Each lane trains its own copy of every linear
            layer in them.
        base_dropout: True to apply the model's own dropout in training, with separate masks for each lane.

    Raises:
        UnsupportedError: A target does not exist or cannot be adapted, the settings do not fit a layer, the
            model carries adapters already, or the variant cannot train this model.
    """
    if any(isinstance(module, (LaneLinear, LaneHead)) for module in model.modules()):
        raise UnsupportedError("the model carries adapters already; detach() them first")
    settings = variant.validate_settings(settings)
    head_layers = {
        f"{head}.{name}" if name else head: module
        for head in heads
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear)
    }
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and not head_layers:
        raise UnsupportedError(f"{variant.name} trains the task's head alone, and this task has none")
    if variant.adaptation_scope is AdaptationScope.FULL_MODEL:
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                raise UnsupportedError(
                    f"{variant.name} trains every weight, and {name} has 4 bits per value (nf4); load the "
                    "model in bfloat16 or float32, or take a variant with adapters"
                )
    target_layers: dict[str, nn.Module] = {}
    if variant.adaptation_scope is AdaptationScope.TARGET_LAYERS:
        found = find_target_layers(model, targets)
        target_layers = {name: module for name, module in found.items() if name not in head_layers}
        if not target_layers:
            raise UnsupportedError(
                f"targets {targets!r}: all of it is the task's head, which is trained in full; "
                "name other layers"
            )
        _check_layers(variant, settings, target_layers)
    return Adapters(model, variant, settings, target_layers, head_layers, base_dropout)


def _check_layers(variant: Variant, settings: VariantSettings, layers: Mapping[str, nn.Module]) -> None:
    views = [view_layer(name, layer).with_settings(settings) for name, layer in layers.items()]
    limits = {view.name: limit for view in views if (limit := variant.largest_rank(view)) is not None}
    if limits and settings.rank > min(limits.values()):
        name = min(limits, key=limits.__getitem__)
        raise UnsupportedError(
            f"rank {settings.rank} is larger than layer {name} allows: at most {limits[name]}"
        )
    for view in views:
        check_fit(variant, view)


def check_fit(variant: Variant, layer: FrozenLayer) -> None:
    """Check that the settings fit a layer.

    Some numbers must divide the layer's inputs or outputs (`Int.divides`), and a variant may have rules of
    its own (`check_layer`).

    Args:
        variant: The variant.
        layer: The frozen layer, with the settings.

    Raises:
        UnsupportedError: The settings do not fit.
    """
    sides = dict(zip(("out", "in"), layer.shape, strict=True))
    for name, each in variant.hyperparameters.items():
        for side in each.divides if isinstance(each, Int) else ():
            if sides[side] % layer.settings[name]:
                raise UnsupportedError(
                    f"{layer.name} has {sides[side]} {side}puts: {name} {layer.settings[name]} does not "
                    "divide them"
                )
    variant.check_layer(layer)
