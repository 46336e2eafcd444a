"""Rare parts of a variant, each a mixin named for what it does: `class Mine(api.StepHooks, api.LowRank)`.

A class that defines one of these methods must inherit from the mixin; `Variant` checks that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from variants.errors import UnsupportedError
from variants.frozen_layer import (
    FrozenLayer,
    InitialTensors,
    LaneView,
    LayerRandom,
    Layers,
    Params,
    RandomOf,
    shared_settings,
)
from variants.variant_settings import CalibrationStatistic, VariantSettings

RANK_MASK = "mask"
"""Name of a layer's frozen tensor with a 1 for each rank in use and a 0 for the others."""


class FusesBase:
    """The frozen layer and the update are computed together, in evaluation and in training without dropout.

    This happens for layers that compute x W^T + bias and have no hooks. A subclass with its own `forward` is
    not fused, unless it defines `forward_with_base` too.
    """

    is_fused: ClassVar[bool] = True

    def __init_subclass__(cls, **options: object) -> None:
        own = vars(cls)
        if "forward" in own:
            cls.is_fused = "forward_with_base" in own
        super().__init_subclass__(**options)

    def fuses(self, layer: FrozenLayer) -> bool:
        """Return whether the variant computes this layer together with the update.

        By default it does if both have one dtype. In a lower precision than the lanes' dtype, the sum of W
        and a small update would round to W.
        """
        return layer.stored_weight.dtype == layer.dtype

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the adapted layer's outputs, (K*R, ..., out), without a call of the frozen layer.

        Args:
            x: The layer's input as the model passes it, (K*R, ..., in).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError


class FrozenUpdate:
    """A part of the update counts as part of the frozen weight, so that dropout does not apply to it.

    Examples are PiSSA's residual and ReLoRA's merged factors. Training with dropout calls `forward` twice:
    for the frozen part with the layer's input before dropout, and for the rest with the input after dropout.
    With `DropoutOnBase` it is called for the whole update with the input after dropout, and for the frozen
    part with the difference of both.
    """

    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors of that part. `prepare` does not get them in the second call."""

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer) -> Params:
        """Compute the tensors with which `forward` adds the frozen part.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError


class DropoutOnBase:
    """The update reads the frozen layer's output; with dropout, its output for the input after dropout."""


class GradientConstants:
    """Some tensors depend on the parameters and are constants in the gradient, as DoRA's row norms."""

    def gradient_constants(self, params: Params, layer: FrozenLayer) -> Params:
        """Return these tensors, (K, ...), under names that no parameter has; `prepare` gets them.

        They are computed once for each value of a lane's parameters, without a graph.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError


class Calibrated:
    """The initialization starts from a matrix of each layer, such as a gradient or the weight's SVD."""

    name: str
    calibration_statistic: ClassVar[CalibrationStatistic]
    """The matrix. If it needs data, `hyperparameters` must have `calibration_batches`."""

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor) -> Params:
        """Reduce the matrix to the few small tensors that the initialization needs.

        Args:
            layer: The frozen layer. Its settings have no alpha, because the result serves all alphas.
            matrix: The matrix that `calibration_statistic` names, in the lanes' dtype.
        """
        raise NotImplementedError

    def calibrated(self, layer: FrozenLayer, *names: str) -> list[Tensor]:
        """Return tensors of `reduce_calibration` on the layer's device and in the lanes' dtype.

        A statistic of the weight is reduced here if `calibrate` has not done it, once for all lanes.

        Raises:
            UnsupportedError: The statistic needs data, and `calibrate` was not called.
        """
        found = layer.calibration
        if not found:
            if self.calibration_statistic.needs_data:
                raise UnsupportedError(f"{layer.name}: {self.name} starts from data; call `calibrate` first")
            layer = replace(layer, settings=replace(layer.settings, alpha=None))
            key = f"{self.name} {layer.settings.rank} {sorted(layer.settings.extra.items())}"
            if key not in layer.cache:
                layer.cache[key] = self.reduce_calibration(layer, layer.weight.to(layer.dtype))
            found = layer.cache[key]
        return [found[name].to(layer.device, layer.dtype) for name in names]


def statistic_of(variant: object) -> CalibrationStatistic:
    """Return the matrix that the initialization of a variant starts from."""
    return variant.calibration_statistic if isinstance(variant, Calibrated) else CalibrationStatistic.NONE


class InitTogether:
    """All layers start together, for example with ranks that differ."""

    def init_layers(self, layers: Layers, random_of: RandomOf) -> dict[str, InitialTensors]:
        """Return one lane's initial tensors of all layers.

        Args:
            layers: The frozen layers by name, with the lane's settings (`shared_settings`).
            random_of: Returns the lane's random values for a layer's name.
        """
        raise NotImplementedError


class SharedTensors:
    """Layers of a group share tensors, which are added to the `params` of each layer in it.

    By default the layers of one type form a group: their names differ only in indices. They share LoRA's
    trainable A (rank, in) and B (out, rank), made for the largest layer; another layer uses the first columns
    of A and the first rows of B.
    """

    one_group: ClassVar[str] = ""
    """Name of the group if all layers form one."""

    def layer_group(self, layer_name: str) -> str:
        """Return the name of the layer's group; by default "self_attn.q_proj" for "0.self_attn.q_proj"."""
        return self.one_group or ".".join(part for part in layer_name.split(".") if not part.isdigit())

    def shared_rank(self, settings: VariantSettings) -> int:
        """Return the rank of the shared A and B: `rank` times the hyperparameter `rank_factor`, if any."""
        return settings.rank * int(settings.extra.get("rank_factor", 1))

    def init_layer_group(self, layers: Layers, random: LayerRandom) -> InitialTensors:
        """Return one lane's initial tensors that the layers of a group share.

        Args:
            layers: The frozen layers of the group by name, with the lane's settings (`shared_settings`).
            random: Random values for this lane and group.
        """
        return random.lora(self.shared_rank(shared_settings(layers)), largest_sides(layers))

    def own_part(self, a: Tensor, b: Tensor, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return the first `in` columns of A (..., rank, >= in) and `out` rows of B (..., >= out, rank)."""
        out_features, in_features = layer.shape
        return a[..., :in_features], b[..., :out_features, :]


def largest_sides(layers: Layers) -> tuple[int, int]:
    """Return the largest `out` and the largest `in` of several layers."""
    out_features, in_features = zip(*(layer.shape for layer in layers.values()), strict=True)
    return max(out_features), max(in_features)


class StepHooks:
    """Code that runs before or after the optimizer's step of a lane."""

    mutable_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that the hooks write. The laws check that all others stay as they are."""
    hook_only_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that only the hooks read."""

    def before_step(self, lane: LaneView) -> None:
        """Run after the backward pass and clipping, before the optimizer's step; may change gradients."""

    def after_step(self, lane: LaneView) -> None:
        """Run after the optimizer's step, while the gradients are still available."""


class RankAllocation:
    """Ranks differ between layers or change in training.

    Layers have a frozen tensor `RANK_MASK`, or the variant overrides `rank_in_use`.
    """

    has_exact_budget: ClassVar[bool] = True
    """False if the sum of all ranks has no fixed value, for example because each layer's rank is rounded."""

    def rank_in_use(self, params: Params, settings: VariantSettings) -> int:
        """Return the number of ranks that are not masked.

        Args:
            params: The tensors of one lane in one layer.
            settings: The lane's settings.
        """
        return int(params[RANK_MASK].sum()) if RANK_MASK in params else settings.rank

    def rank_budget(
        self, layer_count: int, settings: VariantSettings, step: int, total_steps: int
    ) -> int | None:
        """Return the sum of `rank_in_use` over all layers at a step; None without `has_exact_budget`.

        Args:
            layer_count: The number of adapted layers.
            settings: The lane's settings.
            step: The number of optimizer steps taken.
            total_steps: The number of optimizer steps in all.
        """
        return layer_count * settings.rank if self.has_exact_budget else None


class AuxiliaryLoss:
    """A lane's training loss gains the mean of a term over its layers."""

    def auxiliary_loss(self, x: Tensor, attention_mask: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the term of this layer for each lane, (K,).

        It must be a mean over examples, so that parts of a batch add up to the whole batch.

        Args:
            x: The layer's input, (K, R, L, in): R examples of L positions per lane.
            attention_mask: (K, R, L), 0.0 at padding and 1.0 elsewhere.
            params: The lanes' tensors before `prepare`, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError


class RateScales:
    """Parameters have learning rates of their own, or the schedule changes."""

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        """Return a factor on the lane's learning rate for the parameters of this name (LoRA+)."""
        return 1.0

    def schedule_lr_scale(self, step: int, total_steps: int, settings: VariantSettings) -> float:
        """Return a factor on the scheduled learning rate, with which ReLoRA warms up after a merge.

        Args:
            step: The step, 0 .. total_steps - 1.
            total_steps: The number of optimizer steps.
            settings: The lane's settings.
        """
        return 1.0


def parameter_lr_scale(variant: object, parameter: str, settings: VariantSettings) -> float:
    """Return `RateScales.parameter_lr_scale` of a variant; 1 for a variant without it."""
    return variant.parameter_lr_scale(parameter, settings) if isinstance(variant, RateScales) else 1.0


def schedule_lr_scale(variant: object, step: int, total_steps: int, settings: VariantSettings) -> float:
    """Return `RateScales.schedule_lr_scale` of a variant; 1 for a variant without it."""
    return variant.schedule_lr_scale(step, total_steps, settings) if isinstance(variant, RateScales) else 1.0


class BiasUpdate:
    """The update changes the layer's bias too."""

    def delta_bias(self, params: Params, layer: FrozenLayer) -> Tensor | None:
        """Return the change of one lane's bias, (out,), or None; arguments as in `Variant.delta_weight`."""
        raise NotImplementedError


MIXINS = (
    FusesBase, FrozenUpdate, GradientConstants, Calibrated, InitTogether, SharedTensors, StepHooks,
    RankAllocation, AuxiliaryLoss, RateScales, BiasUpdate,
)  # fmt: skip


def check_mixins(cls: type[object], mixins: Iterable[type[object]]) -> None:
    """Check that a class inherits from the mixin of each hook that it defines, which would not run otherwise.

    Args:
        cls: The class.
        mixins: All mixins.

    Raises:
        TypeError: It does not.
    """
    for mixin in mixins:
        defined = {name for name in vars(cls).keys() & vars(mixin).keys() if not name.startswith("_")}
        if defined and not issubclass(cls, mixin):
            raise TypeError(
                f"{cls.__name__} defines {min(defined)}, so it must also inherit from api.{mixin.__name__}: "
                f"class {cls.__name__}(api.{mixin.__name__}, ...)"
            )
