"""The interface of a variant, which states how a frozen linear layer learns.

Shapes: a weight W is (out, in), A is (rank, in), B is (out, rank). A lane is one adapter in training; K lanes
share one frozen base model.

A variant is one file with one subclass of `Variant`. It must define `scaling`, `init`, `forward`,
`delta_weight` and `parameter_count`. The choice of layers, the lanes, dropout, merging and storage are
handled elsewhere. Optional parts: an initialization from gradients, inputs or an SVD of the weight
(`calibration_statistic`, `reduce_calibration`), parameters that layers share (`layer_group`), an auxiliary
loss (`auxiliary_loss`), learning rates of its own (`parameter_lr_scale`, `schedule_lr_scale`), tensors that
are computed once a step (`gradient_constants`), a forward pass that includes the frozen layer's output
(`includes_base`, `forward_with_base`), hooks around the optimizer's step (`before_step`, `after_step`), and
ranks that differ between layers or change during training (`init_layers`, `rank_in_use`, `rank_budget`).

This module also exports everything that an implementation of a variant needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Generator, Tensor

from variants.batch_invariant import batch_invariant_baddbmm, batch_invariant_bmm, pad_rank_one
from variants.errors import MergeError, UnsupportedError
from variants.initializers import lora_init, uniform_init
from variants.lane_views import FrozenLayer, InitialTensors, LaneView, LayerView, Params
from variants.peft_format import PeftFormat
from variants.seeds import parameter_generator, stable_seed
from variants.variant_settings import ExtraSettings, Limits, VariantSettings

__all__ = [
    "AdaptationScope", "Batching", "CalibrationStatistic", "ExtraSettings", "FrozenLayer",
    "InitialTensors", "LaneView", "LayerView", "Limits", "MergeError", "Params", "UnsupportedError",
    "Variant", "VariantSettings", "VerifiedBy", "batch_invariant_baddbmm", "batch_invariant_bmm",
    "lora_init", "pad_rank_one", "parameter_generator", "stable_seed", "uniform_init",
]  # fmt: skip


class Batching(StrEnum):
    """Kind of computation that the lanes of a lane group share."""

    BATCHED = "batched"
    """One batched matrix product computes all lanes; the base model is never written."""
    DENSE = "dense"
    """The variant forms a full-size update, mostly for one layer and lane at a time (`DenseProduct`)."""
    EXCLUSIVE = "exclusive"
    """The variant writes the base model or keeps full-size state; a lane group holds one lane."""


class AdaptationScope(StrEnum):
    """The part of the model that a variant trains, besides the task's head."""

    TARGET_LAYERS = "target_layers"
    """The target layers."""
    HEAD_ONLY = "head_only"
    """Nothing: only the task's head learns."""
    FULL_MODEL = "full_model"
    """Every parameter of the model."""


class CalibrationStatistic(StrEnum):
    """The matrix per layer that an initialization is computed from."""

    NONE = "none"
    WEIGHT = "weight"
    """The frozen weight itself, (out, in), for a reduction that takes long, such as an SVD."""
    MEAN_GRADIENT = "gradient"
    """The mean gradient of the loss with respect to the frozen weight, (out, in)."""
    INPUT_COVARIANCE = "inputs"
    """The covariance of the layer's inputs, (in, in)."""

    @property
    def needs_data(self) -> bool:
        """Whether the matrix is computed from calibration batches."""
        return self in (CalibrationStatistic.MEAN_GRADIENT, CalibrationStatistic.INPUT_COVARIANCE)


class VerifiedBy(StrEnum):
    """Source that the implementation of a variant was compared with."""

    REFERENCE_IMPLEMENTATION = "reference_implementation"
    """A trusted implementation, step for step: PEFT, or plain AdamW for the two controls."""
    AUTHORS_CODE = "authors_code"
    """The update rule in the authors' code."""
    PAPER = "paper"
    """The paper's equations."""
    NONE = "none"
    """Nothing."""


class Variant(PeftFormat):
    """A rule that states how a frozen linear layer learns.

    A variant has no state: one instance serves all layers and lanes.
    """

    name: ClassVar[str]
    """The name on the command line, equal to the name of the file."""
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.NONE
    batching: ClassVar[Batching] = Batching.BATCHED
    numerics: ClassVar[int] = 1
    """Raised by hand when a change alters results; records of a lower number then no longer count."""
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.TARGET_LAYERS
    uses_rank: ClassVar[bool] = True
    is_rank_limited_by_layer: ClassVar[bool] = True
    """True if the rank must not exceed the smaller side of a layer."""
    singular_vectors_per_rank: ClassVar[int] = 1
    """Number of singular vectors of the layer that each rank takes. The limit of the rank is divided by this
    number."""
    uses_alpha: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = True
    """True if dropout is part of the method; otherwise a dropout in the settings is replaced by 0."""
    calibration_statistic: ClassVar[CalibrationStatistic] = CalibrationStatistic.NONE
    """Input of the initialization. If it needs data, `extra_defaults` must have `calibration_batches`."""
    mutable_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that the hooks write; all others keep their initial values."""
    hook_only_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that only the hooks read."""
    has_auxiliary_loss: ClassVar[bool] = False
    """True if the variant defines `auxiliary_loss`."""
    extra_defaults: ClassVar[ExtraSettings] = {}
    """Hyperparameters that only this variant has, with their defaults."""
    extra_limits: ClassVar[Mapping[str, Limits]] = {}
    """Permitted values of the numeric hyperparameters in `extra_defaults`; the others are not checked."""
    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors whose part of the update counts as part of the frozen weight (PiSSA's
    residual, ReLoRA's merged factors), so that dropout does not apply to it. In training with dropout
    `prepare_frozen_update` prepares that part, and `prepare` does not get these tensors."""
    dropout_on_base: ClassVar[bool] = False
    """True if the update reads the frozen layer's output. In training with dropout, the update then reads the
    frozen layer's output for the input after dropout."""

    def scaling(self, settings: VariantSettings) -> float:
        """Return the factor s in front of the update."""
        raise NotImplementedError

    def init(self, layer: FrozenLayer, settings: VariantSettings, generator: Generator) -> InitialTensors:
        """Return one lane's initial tensors of one layer.

        Args:
            layer: The frozen layer.
            settings: The lane's settings, with all defaults filled in.
            generator: The generator of this lane and layer. `parameter_generator(generator, "A")` gives the
                noise of parameter A. It depends on seed, layer and parameter only, so that every variant and
                learning rate gets the same noise.
        """
        raise NotImplementedError

    def init_layers(
        self,
        layers: Mapping[str, FrozenLayer],
        settings: VariantSettings,
        generator: Callable[[str], torch.Generator],
    ) -> dict[str, InitialTensors]:
        """Return one lane's initial tensors of all layers.

        A variant overrides this method to distribute ranks among the layers.

        Args:
            layers: The frozen layers by name.
            settings: The lane's settings, with all defaults filled in.
            generator: Returns the lane's generator for a layer's name.
        """
        return {name: self.init(layer, settings, generator(name)) for name, layer in layers.items()}

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor, settings: VariantSettings) -> Params:
        """Reduce a layer's calibration statistic to the few small tensors that the initialization needs.

        Args:
            layer: The frozen layer.
            matrix: The matrix that `calibration_statistic` names.
            settings: The settings, with all defaults filled in.
        """
        raise NotImplementedError

    def layer_group(self, layer_name: str) -> str | None:
        """Return the name of the layer group whose tensors this layer shares, or None.

        The tensors of the group are added to the `params` of each layer in it.
        """
        return None

    def init_layer_group(
        self, layers: Mapping[str, FrozenLayer], settings: VariantSettings, generator: Generator
    ) -> InitialTensors:
        """Return one lane's initial tensors that the layers of a group share.

        Args:
            layers: The frozen layers of the group by name.
            settings: The lane's settings, with all defaults filled in.
            generator: The generator of this lane and group.
        """
        raise NotImplementedError

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        """Compute the tensors for `forward` that depend on the parameters and not on the layer's input.

        Training calls the method at every forward pass, inside the graph; evaluation calls it once for many
        passes.

        Args:
            params: The lanes' tensors and the result of `gradient_constants`, (K, ...).
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1), for tensors (K, rows, columns). For a tensor of
                four dimensions such as (K, experts, out, rank) use `scaling.view(-1, 1, 1, 1)`: otherwise
                PyTorch aligns the lanes with the experts.
        """
        return params

    def gradient_constants(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        """Compute the tensors for `prepare` that depend on the parameters but are constants in the gradient.

        They are computed once for each value of a lane's parameters, without a graph, and serve all
        micro-batches of a step and all batches of an evaluation. `prepare` finds them in its `params`.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).

        Returns:
            Tensors (K, ...) under names that no parameter has.
        """
        return {}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        """Return the outputs of the adapted layer, (K, N, out).

        Parameters come in `layer.dtype`. Cast them to `x.dtype` before a product with x, and multiply with
        `batch_invariant_bmm` and `batch_invariant_baddbmm`.

        Args:
            x: The layer's input, (K, N, in).
            base: The frozen layer's output with bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).
        """
        raise NotImplementedError

    def includes_base(self, layer: FrozenLayer) -> bool:
        """Return whether `forward_with_base` replaces the frozen layer and `forward` for this layer.

        The replacement applies in evaluation, and in training without dropout, to layers that compute
        x W^T + bias and have no hooks; other layers are called.
        """
        return False

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        """Return the adapted layer's outputs, (K*R, ..., out), computed without a call of the frozen layer.

        Args:
            x: The layer's input as the model passes it, (K*R, ..., in).
            params: The result of `prepare`.
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).
        """
        raise NotImplementedError

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        """Compute the tensors with which `forward` adds the frozen part of the update.

        The method is called only in training with dropout, for layers that have tensors of
        `frozen_update_buffers`. `forward` is then called twice: for the frozen part with the layer's input
        before dropout, and for the rest with the input after dropout.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).
        """
        raise NotImplementedError

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        """Return W' - W of one lane as (out, in) in `layer.dtype`.

        Args:
            params: The lane's tensors before `prepare`, without the lane dimension.
            layer: The frozen layer.
            scaling: The lane's factor s.

        Raises:
            MergeError: The update is not a matrix that could be added to the weight.
        """
        raise MergeError(f"{self.name} cannot be merged: its update is not a matrix")

    def auxiliary_loss(self, x: Tensor, attention_mask: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the auxiliary loss of this layer for each lane, (K,).

        A lane's training loss gains the mean over its layers. The loss must be a mean over examples, so that
        parts of a batch add up to the whole batch.

        Args:
            x: The layer's input, (K, R, L, in): R examples of L positions per lane.
            attention_mask: (K, R, L), 0.0 at padding and 1.0 elsewhere.
            params: The lanes' tensors before `prepare`, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        """Return a factor on the lane's learning rate for the parameters of this name (used by LoRA+)."""
        return 1.0

    def schedule_lr_scale(self, step: int, total_steps: int, settings: VariantSettings) -> float:
        """Return a factor on the lane's scheduled learning rate in step 0 .. total_steps - 1.

        ReLoRA uses it to warm up again after each merge.
        """
        return 1.0

    def before_step(self, lane: LaneView) -> None:
        """Run after the backward pass and clipping, before the optimizer's step; may change gradients."""

    def after_step(self, lane: LaneView) -> None:
        """Run after the optimizer's step, while the gradients are still available."""

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        """Return the number of trainable values in one layer that uses `settings.rank` ranks."""
        raise NotImplementedError

    def rank_in_use(self, params: Params, settings: VariantSettings) -> int:
        """Return the number of ranks of one lane and layer that are not masked."""
        return settings.rank

    def rank_budget(self, layer_count: int, settings: VariantSettings, step: int, total_steps: int) -> int:
        """Return the sum of `rank_in_use` over all layers after `step` of `total_steps` steps."""
        return layer_count * settings.rank

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        """Check the settings and return them with the defaults of `extra_defaults` filled in.

        Settings that the variant does not use become 0 (rank, dropout) or None (alpha).

        Raises:
            UnsupportedError: The variant does not know a setting or cannot take its value.
        """
        rank, alpha, dropout = settings.rank, settings.alpha, settings.dropout
        if self.uses_rank and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise UnsupportedError(f"rank {rank!r}: must be a whole number of at least 1")
        if self.uses_alpha and (alpha is None or not math.isfinite(alpha) or alpha <= 0):
            raise UnsupportedError(f"alpha {alpha!r}: must be a finite number above 0")
        if not 0 <= dropout < 1:
            raise UnsupportedError(f"dropout {dropout!r}: must be at least 0 and below 1")
        unknown = set(settings.extra) - set(self.extra_defaults)
        if unknown:
            known = ", ".join(sorted(self.extra_defaults)) or "none"
            raise UnsupportedError(f"{self.name} does not know {min(unknown)!r}; its own settings: {known}")
        extra = {**self.extra_defaults, **settings.extra}
        for name, limits in self.extra_limits.items():
            limits.check(name, extra[name], self.extra_defaults[name])
        return replace(
            settings,
            rank=rank if self.uses_rank else 0,
            alpha=alpha if self.uses_alpha else None,
            dropout=dropout if self.uses_dropout else 0.0,
            extra=extra,
        )
