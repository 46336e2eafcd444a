"""What a variant may say about how a frozen linear layer learns.

Orientation everywhere: a weight W is (out, in); A is (rank, in), B is (out, rank); a lane is one adapter in
training, and K lanes share one frozen base.

A variant is one file with one subclass of `Variant`. Only `start`, `forward`, `delta` and `parameter_count`
are its own business; everything else (which layers, lanes, dropout, merging, storage) is done for it. Room
that is left, and not built: starts from gradients or activations (a second argument of `start`), hooks after
backward and after a step, auxiliary losses, parameters shared across layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
"""A layer's tensors by name, trainable and frozen: (K, ...) for several lanes, (...) where one lane is
meant."""

Extra = Mapping[str, float | int | str | bool]


class Kind(StrEnum):
    STACKED = "stacked"
    """One batched matmul over all lanes; the base is never written."""
    DENSE = "dense"
    """Forms a full-size update: on large layers one lane at a time, recomputed in backward."""
    ALONE = "alone"
    """Writes the base or keeps full-size state: packs of one lane."""


class Checked(StrEnum):
    ORACLE = "oracle"
    """Step for step equal to a trusted implementation (PEFT)."""
    OFFICIAL = "official"
    """Compared with the authors' update rule."""
    PAPER = "paper"
    """Compared with the paper's equations."""
    NONE = "none"
    """Not checked: enters no verdict."""


class MergeRefused(ValueError):
    """The variant's update is no single matrix that could be added to the weight."""


class Unsupported(ValueError):
    """A value that a variant or a model cannot take; the text names the value, the rule and the way out."""


@dataclass(frozen=True)
class Settings:
    """A lane's hyperparameters of the variant. In one pack only `alpha` may differ between lanes."""

    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    """Probability that an input of the adapter is zeroed in training; the frozen path sees every input."""
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layer:
    """A frozen linear layer. `weight` is (out, in) whatever the module stores; never write to it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    """Room for what a variant derives from the frozen weight alone (an SVD, row norms), shared by all
    lanes."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a lane's tensors: float32, or float64 over a float64 weight."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Start:
    """Where one lane of one layer begins: tensors without the lane dimension, in `layer.dtype`."""

    trainable: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)


class Variant:
    """How a frozen linear layer learns. Stateless: one instance serves all layers and lanes."""

    name: ClassVar[str]
    """As on the command line; equals the file's name."""
    title: ClassVar[str]
    axis: ClassVar[str]
    """Equals the folder's name."""
    paper: ClassVar[str]
    """arXiv id."""
    checked: ClassVar[Checked] = Checked.NONE
    kind: ClassVar[Kind] = Kind.STACKED
    numerics: ClassVar[int] = 1
    """Raise it by hand when a change alters results: old records then no longer count."""
    uses_alpha: ClassVar[bool] = True
    extra: ClassVar[Extra] = {}
    """Hyperparameters that only this variant knows, with their defaults."""
    drops_base: ClassVar[bool] = False
    """The update reads the frozen layer's output too, so that dropout has to reach that output as well."""

    def scaling(self, settings: Settings) -> float:
        """The factor s in front of the update."""
        raise NotImplementedError

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        """Draws one lane's tensors. `stream(generator, "A")` is the noise of parameter A: it depends on seed,
        layer and parameter only, so that every variant and rate gets the same."""
        raise NotImplementedError

    def prepare(self, params: Params, layer: Layer, scaling: Tensor) -> Params:
        """What `forward` needs and what depends on the parameters alone: done once per generation, not once
        per token. In training it runs at every forward, inside the graph. `scaling` is (K, 1, 1)."""
        return params

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: Layer, scaling: Tensor) -> Tensor:
        """The layer's output (K, N, out) from its input x (K, N, in), the frozen layer's output `base` with
        bias (K, N, out), what `prepare` returned, and scaling (K, 1, 1).

        Parameters come in `layer.dtype`; cast them to `x.dtype` where they meet x.
        """
        raise NotImplementedError

    def delta(self, params: Params, layer: Layer, scaling: float) -> Tensor:
        """W' - W as (out, in) in `layer.dtype`, for one lane; raises MergeRefused if there is no such
        matrix."""
        raise MergeRefused(f"{self.name} cannot be merged: its update is no matrix")

    def learning_rate_scale(self, parameter: str) -> float:
        """Factor on the lane's learning rate for a parameter of this name (LoRA+)."""
        return 1.0

    def parameter_count(self, out_features: int, in_features: int, settings: Settings) -> int:
        """Trainable numbers in one layer."""
        raise NotImplementedError

    def to_peft(self, params: Params, settings: Settings) -> dict[str, Tensor] | None:
        """One layer's tensors under the PEFT library's names, or None where PEFT does not have the method."""
        return None

    def peft_config(self, settings: Settings) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that describe what `to_peft` returns."""
        raise NotImplementedError

    def from_peft(self, config: Mapping[str, Any]) -> Settings | None:
        """The settings behind a PEFT config that is this variant's, else None."""
        return None

    def start_from_peft(self, tensors: Mapping[str, Tensor], layer: Layer) -> Start:
        """The inverse of `to_peft`."""
        raise NotImplementedError

    def checked_settings(self, settings: Settings) -> Settings:
        """`settings` with the defaults of `extra` filled in; raises Unsupported on a value that cannot be."""
        rank, alpha, dropout = settings.rank, settings.alpha, settings.dropout
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise Unsupported(f"rank {rank!r}: must be a whole number of at least 1")
        if self.uses_alpha and (alpha is None or not math.isfinite(alpha) or alpha <= 0):
            raise Unsupported(f"alpha {alpha!r}: must be a finite number above 0")
        if not 0 <= dropout < 1:
            raise Unsupported(f"dropout {dropout!r}: must be at least 0 and below 1")
        unknown = set(settings.extra) - set(self.extra)
        if unknown:
            known = ", ".join(sorted(self.extra)) or "none"
            raise Unsupported(f"{self.name} does not know {sorted(unknown)[0]!r}; its own settings: {known}")
        return Settings(rank, alpha if self.uses_alpha else None, dropout, {**self.extra, **settings.extra})


def number(*parts: int | str) -> int:
    """A 63-bit number that depends on all the parts and nothing else: a seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(generator: torch.Generator, parameter: str) -> torch.Generator:
    """A parameter's own noise, whatever was drawn from `generator` before."""
    return torch.Generator().manual_seed(number(generator.initial_seed(), parameter))


def uniform(shape: tuple[int, ...], bound: float, layer: Layer, generator: torch.Generator) -> Tensor:
    """U(-bound, bound), drawn on the CPU in float32 so that every device starts from the same numbers."""
    draw = torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).mul_(bound)
    return draw.to(layer.weight.device, layer.dtype)


def widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (K, rank, in) and B (K, out, rank), at rank 1 with a rank of zeros added: a product with a single
    column is summed in another order for one lane than for several, and lanes would depend on their
    company."""
    if a.shape[1] > 1:
        return a, b
    return torch.nn.functional.pad(a, (0, 0, 0, 1)), torch.nn.functional.pad(b, (0, 1))


def vanilla_start(layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
    """LoRA's own: A (rank, in) ~ U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt 5; B
    (out, rank) zero, so that the update is."""
    out_features, in_features = layer.weight.shape
    noise = stream(generator, "A")
    a = uniform((settings.rank, in_features), 1 / math.sqrt(in_features), layer, noise)
    b = torch.zeros(out_features, settings.rank, dtype=layer.dtype, device=layer.weight.device)
    return Start({"A": a, "B": b})
