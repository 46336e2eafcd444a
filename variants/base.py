"""The interface of a variant, which states how a frozen linear layer learns.

Shapes: a weight W is (out, in), A is (rank, in), B is (out, rank). A lane is one adapter in training; K lanes
share one frozen base model.

A variant is one file with one public subclass of `Variant`. It defines `parameters`, `forward`, and, unless
`is_mergeable` is False, `delta_weight`; base classes define the last two: `LoRA` (a product of two factors),
`DenseUpdate` (a matrix of the size of W), `InputMap` and `OutputMap` (a map of the layer's input or output),
`Mixture` (experts). The choice of layers, the lanes, dropout, merging and
storage are handled elsewhere. Optional parts: an initialization from gradients, inputs or an SVD of the
weight (`calibration_statistic`, `reduce_calibration`), parameters that layers share (`layer_group`), an
auxiliary loss (`auxiliary_loss`), learning rates of its own (`parameter_lr_scale`, `schedule_lr_scale`),
tensors that are computed once a step (`gradient_constants`), a forward pass that includes the frozen layer's
output (`includes_base`, `forward_with_base`), hooks around the optimizer's step (`before_step`,
`after_step`), and ranks that differ between layers or change during training (`init_layers`, a frozen tensor
"mask", `rank_budget`). `variants.api` exports the types and helpers that most variants need.

In the docstrings of variants "the survey" is He et al. 2026 (arXiv 2601.22708).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from variants.errors import UnsupportedError
from variants.frozen_layer import FrozenLayer, InitialTensors, LaneView, LayerRandom, Layers, Params, RandomOf
from variants.parameter_formula import ParameterCount, evaluate_formula
from variants.peft_format import PeftFormat
from variants.traits import AdaptationScope, Batching, CalibrationStatistic, Start, VerifiedBy
from variants.variant_settings import ExtraSettings, Hyperparameter, VariantSettings, complete_extra

RANK_MASK = "mask"
"""Name of a layer's frozen tensor with a 1 for each rank in use and a 0 for the others."""


class Variant(ParameterCount, PeftFormat):
    """A rule that states how a frozen linear layer learns.

    A variant has no state: one instance serves all layers and lanes.
    """

    name: ClassVar[str]
    """The name on the command line; by default the name of the file."""
    axis: ClassVar[str]
    """The kind of change that the variant makes to LoRA: the folder of the file."""
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {}
    """Hyperparameters that only this variant has: defaults, permitted values and help."""
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.NONE
    """Not inherited: a class that does not define this attribute itself is not verified."""
    batching: ClassVar[Batching] = Batching.BATCHED
    numerics: ClassVar[int] = 1
    """Raised by hand when a change alters results; records of a lower number then no longer count."""
    revision: ClassVar[str] = ""
    """Version of code from outside this package, which the fingerprint includes; empty for other variants."""
    source_path: ClassVar[str] = ""
    """The path from which this process loaded a user's file; empty for other variants."""
    source_code: ClassVar[bytes] = b""
    """The content of that file; empty for other variants."""
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.TARGET_LAYERS
    uses_rank: ClassVar[bool] = True
    rank_limit: ClassVar[str] = "min(in, out)"
    """Formula of a layer's largest rank, over `in`, `out` and the own hyperparameters; empty for no limit."""
    uses_alpha: ClassVar[bool] = True
    is_rank_stabilized: ClassVar[bool] = False
    """True if s = alpha / sqrt(rank), as in rsLoRA."""
    uses_dropout: ClassVar[bool] = True
    """True if dropout is part of the method; otherwise a dropout in the settings is replaced by 0."""
    start: ClassVar[Start] = Start.BASE
    is_mergeable: ClassVar[bool] = True
    """False if the update is not a matrix that could be added to the weight."""
    merge_obstacle: ClassVar[str] = "its update is not a matrix"
    """If `is_mergeable` is False, why: a clause that follows "NAME cannot be merged: "."""
    typical_lr_scale: ClassVar[float] = 1.0
    """Order of magnitude of the best learning rate divided by LoRA's."""
    calibration_statistic: ClassVar[CalibrationStatistic] = CalibrationStatistic.NONE
    """Input of the initialization. If it needs data, `hyperparameters` must have `calibration_batches`."""
    mutable_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that the hooks write; all others keep their initial values."""
    hook_only_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that only the hooks read."""
    has_auxiliary_loss: ClassVar[bool] = False
    """True if the variant defines `auxiliary_loss`."""
    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors whose part of the update counts as part of the frozen weight (PiSSA's
    residual, ReLoRA's merged factors), so that dropout does not apply to it. In training with dropout
    `prepare_frozen_update` prepares that part, and `prepare` does not get these tensors, except with
    `dropout_on_base`."""
    dropout_on_base: ClassVar[bool] = False
    """True if the update reads the frozen layer's output. In training with dropout, the update then reads the
    frozen layer's output for the input after dropout."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        *_, folder, file = ("", *cls.__module__.split("."))
        cls.name, cls.axis = vars(cls).get("name", file), vars(cls).get("axis", folder)
        cls.verified_by = vars(cls).get("verified_by", VerifiedBy.NONE)  # not that of the class it extends

    @property
    def extra_defaults(self) -> ExtraSettings:
        """Defaults of the hyperparameters that only this variant has."""
        return {name: each.default for name, each in self.hyperparameters.items()}

    def scaling(self, settings: VariantSettings) -> float:
        """Return the factor s in front of the update.

        It is alpha / rank, alpha / sqrt(rank) if `is_rank_stabilized`, and 1 for a variant without alpha.
        """
        if not self.uses_alpha:
            return 1.0
        assert settings.alpha is not None
        s = settings.alpha / settings.rank
        return s * math.sqrt(settings.rank) if self.is_rank_stabilized else s

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        """Return one lane's initial tensors of one layer; by default LoRA's A and B (`LayerRandom.lora`).

        Args:
            layer: The frozen layer, with the lane's settings.
            random: Random values for this lane and layer, for example `random.kaiming("A", (rank, in))`.
        """
        return random.lora()

    def init_layers(self, layers: Layers, random_of: RandomOf) -> dict[str, InitialTensors]:
        """Return one lane's initial tensors of all layers, for example with ranks that differ.

        Args:
            layers: The frozen layers by name, with the lane's settings (`shared_settings`).
            random_of: Returns the lane's random values for a layer's name.
        """
        return {name: self.init(layer, random_of(name)) for name, layer in layers.items()}

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor) -> Params:
        """Reduce a layer's calibration statistic to the few small tensors that the initialization needs.

        Args:
            layer: The frozen layer. Its settings have no alpha, because the result serves all alphas.
            matrix: The matrix that `calibration_statistic` names, in the lanes' dtype.
        """
        raise NotImplementedError

    def calibrated(self, layer: FrozenLayer, *names: str) -> list[Tensor]:
        """Return tensors of `reduce_calibration` on the layer's device and in the lanes' dtype.

        A statistic of the weight that was not computed before (`calibrate`) is reduced here, once for all
        lanes of a model.

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

    def layer_group(self, layer_name: str) -> str | None:
        """Return the name of the layer group whose tensors this layer shares, or None.

        The tensors of the group are added to the `params` of each layer in it.
        """
        return None

    def init_layer_group(self, layers: Layers, random: LayerRandom) -> InitialTensors:
        """Return one lane's initial tensors that the layers of a group share.

        Args:
            layers: The frozen layers of the group by name, with the lane's settings (`shared_settings`).
            random: Random values for this lane and group.
        """
        raise NotImplementedError

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        """Compute the tensors for `forward` that depend on the parameters and not on the layer's input.

        Training calls the method at every forward pass, inside the graph; evaluation calls it once for many
        passes.

        Args:
            params: The lanes' tensors and the result of `gradient_constants`, (K, ...).
            layer: The frozen layer. Its factor s, (K, 1, 1), is for tensors (K, rows, columns). For a tensor
                of four dimensions such as (K, experts, out, rank) use `layer.scaling.view(-1, 1, 1, 1)`:
                otherwise PyTorch aligns the lanes with the experts.
        """
        return params

    def gradient_constants(self, params: Params, layer: FrozenLayer) -> Params:
        """Compute the tensors for `prepare` that depend on the parameters but are constants in the gradient.

        They are computed once for each value of a lane's parameters, without a graph, and serve all
        micro-batches of a step and all batches of an evaluation. `prepare` finds them in its `params`.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.

        Returns:
            Tensors (K, ...) under names that no parameter has.
        """
        return {}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the outputs of the adapted layer, (K, N, out).

        Parameters come in `layer.dtype`. Cast them to `x.dtype` before a product with x, and multiply with
        `api.bmm` and `api.baddbmm`, which give each lane the bits that it gets alone.

        Args:
            x: The layer's input, (K, N, in).
            base: The frozen layer's output with bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def includes_base(self, layer: FrozenLayer) -> bool:
        """Return whether `forward_with_base` replaces the frozen layer and `forward` for this layer.

        The replacement applies in evaluation, and in training without dropout, to layers that compute
        x W^T + bias and have no hooks; other layers are called.
        """
        return False

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the adapted layer's outputs, (K*R, ..., out), computed without a call of the frozen layer.

        Args:
            x: The layer's input as the model passes it, (K*R, ..., in).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer) -> Params:
        """Compute the tensors with which `forward` adds the frozen part of the update.

        The method is called only in training with dropout, for layers that have tensors of
        `frozen_update_buffers`. `forward` is then called twice: for the frozen part with the layer's input
        before dropout, and for the rest with the input after dropout. With `dropout_on_base` it is called for
        the whole update with the input after dropout, and for the frozen part with the difference of both.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        """Return W' - W of one lane as (out, in) in `layer.dtype`.

        Args:
            params: The lane's tensors before `prepare`, without the lane dimension.
            layer: The frozen layer, with the lane's settings and its factor s, ().

        Raises:
            MergeError: The update of this layer is not a matrix that could be added to the weight.
        """
        raise NotImplementedError

    def delta_bias(self, params: Params, layer: FrozenLayer) -> Tensor | None:
        """Return the change of one lane's bias, (out,), or None; arguments as in `delta_weight`."""
        return None

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
        """Return a factor on the lane's learning rate for some of its parameters (used by LoRA+).

        Args:
            parameter: The name of the parameter, which every layer has.
            settings: The lane's settings.
        """
        return 1.0

    def schedule_lr_scale(self, step: int, total_steps: int, settings: VariantSettings) -> float:
        """Return a factor on the lane's scheduled learning rate, with which ReLoRA warms up after a merge.

        Args:
            step: The step, 0 .. total_steps - 1.
            total_steps: The number of optimizer steps.
            settings: The lane's settings.
        """
        return 1.0

    def before_step(self, lane: LaneView) -> None:
        """Run after the backward pass and clipping, before the optimizer's step; may change gradients."""

    def after_step(self, lane: LaneView) -> None:
        """Run after the optimizer's step, while the gradients are still available."""

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
        """Return the sum of `rank_in_use` over all layers at a step of the training.

        None means that the variant has no exact budget, for example because it rounds each layer's rank.

        Args:
            layer_count: The number of adapted layers.
            settings: The lane's settings.
            step: The number of optimizer steps taken.
            total_steps: The number of optimizer steps in all.
        """
        return layer_count * settings.rank

    def largest_rank(self, layer: FrozenLayer) -> int | None:
        """Return the value of `rank_limit` for a layer, or None if there is no limit."""
        if not (self.uses_rank and self.rank_limit):
            return None
        return evaluate_formula(self.rank_limit, 0, layer.shape, 1, self.formula_names(layer.settings))

    def check_layer(self, layer: FrozenLayer) -> None:
        """Check that the settings fit a layer, before the model is adapted.

        `rank_limit` and `Int.divides` are checked besides.

        Raises:
            UnsupportedError: They do not fit; the message names the layer, the size and the rule.
        """

    def fit_settings(self, settings: VariantSettings, shapes: Iterable[tuple[int, int]]) -> VariantSettings:
        """Return the settings with the values that follow from the sizes of the adapted layers.

        Args:
            settings: Valid settings.
            shapes: (out, in) of all adapted layers.
        """
        return settings

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        """Check the settings and return them with the defaults of `hyperparameters` filled in.

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
        extra = complete_extra(self.name, self.hyperparameters, settings.extra)
        return replace(
            settings,
            rank=rank if self.uses_rank else 0,
            alpha=alpha if self.uses_alpha else None,
            dropout=dropout if self.uses_dropout else 0.0,
            extra=extra,
        )
