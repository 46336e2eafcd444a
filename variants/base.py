"""What a variant may say about how a frozen linear layer learns.

Orientation everywhere: a weight W is (out, in); A is (rank, in), B is (out, rank); a lane is one adapter in
training, and K lanes share one frozen base.

A variant is one file with one subclass of `Variant`. Only `start`, `forward`, `delta` and `parameter_count`
are its own business; everything else (which layers, lanes, dropout, merging, storage) is done for it. What
some need besides: a start from gradients or inputs (`evidence`, `distill`), parameters that layers share
(`group`), an auxiliary loss, hooks around the optimizer's step, ranks that move (`rank_in_use`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Params = Mapping[str, Tensor]
"""A layer's tensors by name, trainable and frozen: (K, ...) for several lanes, (...) where one lane is
meant."""

ExtraSettings = Mapping[str, float | int | str | bool]


class Batching(StrEnum):
    BATCHED = "batched"
    """One batched matmul over all lanes; the base is never written."""
    DENSE = "dense"
    """Forms a full-size update: on large layers one lane at a time, recomputed in backward."""
    EXCLUSIVE = "exclusive"
    """Writes the base or keeps full-size state: packs of one lane."""


class AdaptationScope(StrEnum):
    TARGET_LAYERS = "target_layers"
    """The target layers."""
    HEAD_ONLY = "head_only"
    """No layer: a task's head learns alone."""
    FULL_MODEL = "full_model"
    """Every parameter of the model."""


class CalibrationStatistic(StrEnum):
    """What a start is computed from, a matrix a layer, over the first batches that the lane will see."""

    NONE = "none"
    MEAN_GRADIENT = "gradient"
    """The mean gradient of the loss by the frozen weight, (out, in)."""
    INPUT_COVARIANCE = "inputs"
    """The covariance of the layer's inputs, (in, in)."""


class VerifiedBy(StrEnum):
    REFERENCE_IMPLEMENTATION = "reference_implementation"
    """Step for step equal to a trusted implementation (PEFT)."""
    AUTHORS_CODE = "authors_code"
    """Compared with the authors' update rule."""
    PAPER = "paper"
    """Compared with the paper's equations."""
    NONE = "none"
    """Not checked: enters no verdict."""


class MergeError(ValueError):
    """The variant's update is no single matrix that could be added to the weight."""


class UnsupportedError(ValueError):
    """A value that a variant or a model cannot take; the text names the value, the rule and the way out."""


@dataclass(frozen=True)
class VariantSettings:
    """A lane's hyperparameters of the variant. In one pack only `alpha` may differ between lanes."""

    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    """Probability that an input of the adapter is zeroed in training; the frozen path sees every input."""
    extra: ExtraSettings = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """A frozen linear layer. `weight` is (out, in) whatever the module stores; never write to it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """Room for what a variant derives from the frozen weight alone (an SVD, row norms), shared by all
    lanes."""
    calibration: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """In `start`, for a variant that asks for evidence: what its `distill` made of this layer's."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a lane's tensors: float32, or float64 over a float64 weight."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class InitialTensors:
    """Where one lane of one layer begins: tensors without the lane dimension, in `layer.dtype`."""

    trainable: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerView:
    """One lane's tensors of one layer, in a hook: parameters with their gradients, and what is frozen."""

    layer: FrozenLayer
    trainable: Mapping[str, nn.Parameter]
    frozen: Mapping[str, Tensor]


@dataclass(frozen=True)
class LaneView:
    """One lane in a hook, under no_grad. Tensors are written in place, frozen ones if declared `moving`."""

    layers: Mapping[str, LayerView]
    settings: VariantSettings
    seed: int
    step: int
    """Optimizer steps taken: 0 before the first, 1 after it."""
    total_steps: int
    """The lane's last step: its horizon."""
    moments: Callable[[Tensor], Mapping[str, Tensor]]
    """AdamW's exp_avg and exp_avg_sq of a parameter; empty before its first step."""

    def generator(self, layer: str) -> torch.Generator:
        """New noise for a layer at this step."""
        return torch.Generator().manual_seed(stable_seed(self.seed, layer, self.step))


class Variant:
    """How a frozen linear layer learns. Stateless: one instance serves all layers and lanes."""

    name: ClassVar[str]
    """As on the command line; equals the file's name."""
    title: ClassVar[str]
    axis: ClassVar[str]
    """Equals the folder's name."""
    paper: ClassVar[str]
    """arXiv id."""
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.NONE
    batching: ClassVar[Batching] = Batching.BATCHED
    numerics: ClassVar[int] = 1
    """Raise it by hand when a change alters results: old records then no longer count."""
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.TARGET_LAYERS
    uses_rank: ClassVar[bool] = True
    is_rank_limited_by_layer: ClassVar[bool] = True
    """Whether a rank above a layer's smaller side makes no sense."""
    singular_vectors_per_rank: ClassVar[int] = 1
    """Of the directions along that side, how many each rank takes."""
    uses_alpha: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = True
    """Whether dropout is part of the method; else settings with it are taken as settings without."""
    calibration_statistic: ClassVar[CalibrationStatistic] = CalibrationStatistic.NONE
    """What the start is computed from. Such a variant has `calibration_batches` among its `extra`."""
    mutable_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that the hooks write; all others stay as they started."""
    hook_only_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors that only the hooks read."""
    has_auxiliary_loss: ClassVar[bool] = False
    """Whether there is an `auxiliary_loss`."""
    extra_defaults: ClassVar[ExtraSettings] = {}
    """Hyperparameters that only this variant knows, with their defaults."""
    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen tensors whose part of the update belongs to the frozen weight (PiSSA's residual,
    ReLoRA's merged factors), so that dropout does not apply to it. In training with dropout `undropped`
    adds that part, and `prepare` does not get these tensors."""
    dropout_on_base: ClassVar[bool] = False
    """The update reads the frozen layer's output too, so that dropout has to reach that output as well."""

    def scaling(self, settings: VariantSettings) -> float:
        """The factor s in front of the update."""
        raise NotImplementedError

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        """Draws one lane's tensors. `stream(generator, "A")` is the noise of parameter A: it depends on seed,
        layer and parameter only, so that every variant and rate gets the same."""
        raise NotImplementedError

    def init_layers(
        self,
        layers: Mapping[str, FrozenLayer],
        settings: VariantSettings,
        generator: Callable[[str], torch.Generator],
    ) -> dict[str, InitialTensors]:
        """All layers' starts: for a variant that weighs layers against each other. `generator(layer)`."""
        return {name: self.init(layer, settings, generator(name)) for name, layer in layers.items()}

    def reduce_calibration(
        self, layer: FrozenLayer, statistic: Tensor, settings: VariantSettings
    ) -> dict[str, Tensor]:
        """What the start needs of a layer's evidence, which is too large to keep: a few small tensors."""
        raise NotImplementedError

    def layer_group(self, layer_name: str) -> str | None:
        """The name of the group whose tensors this layer shares; they join the layer's own `params`."""
        return None

    def init_layer_group(
        self, layers: Mapping[str, FrozenLayer], settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        """One lane's tensors of a group, for the layers in it."""
        raise NotImplementedError

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        """What `forward` needs and what depends on the parameters alone: done once per generation, not once
        per token. In training it runs at every forward, inside the graph. `scaling` is (K, 1, 1): it fits
        tensors (K, rows, columns). With four dimensions, as (K, experts, out, rank), PyTorch would broadcast
        the lanes along the experts: take `scaling.view(-1, 1, 1, 1)`."""
        return params

    def forward(
        self, x: Tensor, base_output: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor
    ) -> Tensor:
        """The layer's output (K, N, out) from its input x (K, N, in), the frozen layer's output `base` with
        bias (K, N, out), what `prepare` returned, and scaling (K, 1, 1).

        Parameters come in `layer.dtype`; cast them to `x.dtype` where they meet x, and multiply them by `bmm`
        and `baddbmm` below.
        """
        raise NotImplementedError

    def add_frozen_update(
        self, x: Tensor, base_output: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor
    ) -> Tensor:
        """Add the part of the update that is frozen, which reads the input without dropout.

        It is called only in training with dropout, for layers that have tensors of `frozen_part`.

        Args:
            x: The layer's input without dropout, (K, N, in).
            base: The frozen layer's output with bias, (K, N, out).
            params: The lanes' tensors as they are kept, (K, ...).
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).

        Returns:
            The `base` that `forward` gets, (K, N, out).
        """
        raise NotImplementedError

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        """W' - W as (out, in) in `layer.dtype`, for one lane; raises MergeRefused if there is no such
        matrix."""
        raise MergeError(f"{self.name} cannot be merged: its update is no matrix")

    def auxiliary_loss(self, x: Tensor, attention_mask: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """(K,): each lane's term of this layer, from its input x (K, R, L, in), R examples of L positions,
        `real` (K, R, L) being 1.0 where a position is no padding, and its tensors (K, ...). A mean over
        examples, so that parts of a batch give what the whole gives. A lane's training loss gains the mean
        over its layers."""
        raise NotImplementedError

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        """Factor on the lane's learning rate for a parameter of this name (LoRA+)."""
        return 1.0

    def schedule_lr_scale(self, step: int, total_steps: int, settings: VariantSettings) -> float:
        """Factor on the lane's learning rate in step 0 .. steps-1, beside its schedule (ReLoRA's warm-up)."""
        return 1.0

    def before_step(self, lane: LaneView) -> None:
        """After backward: the step's gradients are complete and clipped. May change them in place."""

    def after_step(self, lane: LaneView) -> None:
        """The optimizer has taken its step; the gradients are still there."""

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        """Trainable numbers in one layer, of which `settings.rank` ranks are in use."""
        raise NotImplementedError

    def rank_in_use(self, params: Params, settings: VariantSettings) -> int:
        """Ranks of one lane's layer that are not masked, for a variant whose ranks move."""
        return settings.rank

    def rank_budget(self, layer_count: int, settings: VariantSettings, step: int, total_steps: int) -> int:
        """What `rank_in_use` sums up to over all layers after `step` of `steps` steps."""
        return layer_count * settings.rank

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor] | None:
        """One layer's tensors under the PEFT library's names, or None where PEFT does not have the method."""
        return None

    def layer_group_to_peft(self, params: Params) -> dict[str, Tensor]:
        """A group's tensors under PEFT's names, seen from the model."""
        return {}

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that describe what `to_peft` returns."""
        raise NotImplementedError

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings | None:
        """The settings behind a PEFT config that is this variant's, else None. A subclass that does not
        define it loads none: what it exports, its parent loads."""
        return None

    def init_from_peft(
        self, tensors: Mapping[str, Tensor], layer: FrozenLayer, settings: VariantSettings
    ) -> InitialTensors:
        """The inverse of `to_peft`."""
        raise NotImplementedError

    def init_layer_group_from_peft(self, tensors: Mapping[str, Tensor]) -> InitialTensors:
        """The inverse of `group_to_peft`."""
        raise NotImplementedError

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        """`settings` with the defaults of `extra` filled in; raises Unsupported on a value that cannot be."""
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
            raise UnsupportedError(
                f"{self.name} does not know {sorted(unknown)[0]!r}; its own settings: {known}"
            )
        return replace(
            settings,
            rank=rank if self.uses_rank else 0,
            alpha=alpha if self.uses_alpha else None,
            dropout=dropout if self.uses_dropout else 0.0,
            extra={**self.extra_defaults, **settings.extra},
        )


def int_setting(settings: VariantSettings, name: str, minimum: int = 1) -> int:
    """One of a variant's own settings that has to be a whole number; raises Unsupported."""
    value = settings.extra[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UnsupportedError(f"{name} {value!r}: must be a whole number of at least {minimum}")
    return value


def float_setting(
    settings: VariantSettings, name: str, minimum: float = 0.0, below: float = math.inf
) -> float:
    """One of a variant's own settings that has to be a number from `least` up to below `below`; raises
    Unsupported."""
    value = settings.extra[name]
    if isinstance(value, (str, bool)) or not minimum <= value < below:
        raise UnsupportedError(
            f"{name} {value!r}: must be a number of at least {minimum:g} and below {below:g}"
        )
    return float(value)


def stable_seed(*parts: int | str) -> int:
    """A 63-bit number that depends on all the parts and nothing else: a seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def parameter_generator(generator: torch.Generator, parameter: str) -> torch.Generator:
    """A parameter's own noise, whatever was drawn from `generator` before."""
    return torch.Generator().manual_seed(stable_seed(generator.initial_seed(), parameter))


def uniform_init(
    shape: tuple[int, ...], bound: float, layer: FrozenLayer, generator: torch.Generator
) -> Tensor:
    """U(-bound, bound), drawn on the CPU in float32 so that every device starts from the same numbers."""
    draw = torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).mul_(bound)
    return draw.to(layer.weight.device, layer.dtype)


def pad_rank_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (K, rank, in) and B (K, out, rank), at rank 1 with a rank of zeros added: a product with a single
    column is summed in another order for one lane than for several, and lanes would depend on their
    company."""
    if a.shape[1] > 1:
        return a, b
    return torch.nn.functional.pad(a, (0, 0, 0, 1)), torch.nn.functional.pad(b, (0, 1))


def batch_invariant_bmm(x: Tensor, y: Tensor) -> Tensor:
    """torch.bmm, in bfloat16 on a CPU the same for one lane as for several: a batch of one would take another
    kernel there, with other last bits, so it is computed beside itself."""
    if len(x) == 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.bmm(torch.cat([x, x]), torch.cat([y, y]))[:1]
    return torch.bmm(x, y)


def batch_invariant_baddbmm(base: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """torch.baddbmm, likewise."""
    if len(x) == 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.baddbmm(*(torch.cat([tensor, tensor]) for tensor in (base, x, y)))[:1]
    return torch.baddbmm(base, x, y)


def lora_init(layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator) -> InitialTensors:
    """LoRA's own: A (rank, in) ~ U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt 5; B
    (out, rank) zero, so that the update is."""
    out_features, in_features = layer.weight.shape
    noise = parameter_generator(generator, "A")
    a = uniform_init((settings.rank, in_features), 1 / math.sqrt(in_features), layer, noise)
    b = torch.zeros(out_features, settings.rank, dtype=layer.dtype, device=layer.weight.device)
    return InitialTensors({"A": a, "B": b})
