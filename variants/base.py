"""The contract of a variant, which states how a frozen linear layer learns.

Shapes: a weight W is (out, in), A is (rank, in), B is (out, rank). A lane is one adapter in training; K lanes
share one frozen base model.

A variant is one file with one public class. Most extend `LowRank` (W' = W + s B A) and state their
hyperparameters, their tensors and initial values (`init`), and their factors. Others extend `DenseUpdate` (a
matrix of the size of W), `InputMap` or `OutputMap` (a map of the input or output), `Mixture` (experts), or
`Variant` itself. Rare parts are the mixins of `variants.hooks`. The choice of layers, the lanes, dropout,
merging, storage and the count of parameters follow from these. `variants.api` exports what a file needs.

In the docstrings of variants "the survey" is He et al. 2026 (arXiv 2601.22708).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from variants.errors import UnsupportedError
from variants.frozen_layer import FrozenLayer, InitialTensors, LayerRandom, Params
from variants.hooks import MIXINS, GradientConstants, check_mixins
from variants.peft_format import PeftFormat
from variants.variant_settings import (
    AdaptationScope,
    Batching,
    ExtraSettings,
    Hyperparameter,
    Start,
    VariantSettings,
    VerifiedBy,
    complete_extra,
)


class Variant:
    """A rule that states how a frozen linear layer learns.

    A variant has no state: one instance serves all layers and lanes.
    """

    name: ClassVar[str]
    """The name on the command line; by default the name of the file."""
    axis: ClassVar[str]
    """The kind of change that the variant makes to LoRA: the folder of the file."""
    paper: ClassVar[str] = ""
    """Authors, and an arXiv number, OpenReview id, DOI or venue; empty for a control."""
    year: ClassVar[int | None] = None
    """The year of the paper's first version; by default that of the arXiv number in `paper`."""
    deviations: ClassVar[str] = ""
    """What differs from the source that the variant follows; "- " begins an item of a list."""
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.NONE
    """Paper, year, deviations and this attribute are not inherited."""
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {}
    """Hyperparameters that only this variant has: defaults, permitted values and help."""
    uses_rank: ClassVar[bool] = True
    uses_alpha: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = True
    """True if dropout is part of the method; otherwise a dropout in the settings is replaced by 0."""
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.TARGET_LAYERS
    batching: ClassVar[Batching] = Batching.BATCHED
    start: ClassVar[Start] = Start.BASE
    merge_obstacle: ClassVar[str] = ""
    """Why the update cannot be merged: a clause that follows "NAME cannot be merged: "; empty if it can."""
    peft_obstacle: ClassVar[str] = "it has no conversion to PEFT's format"
    """Why a variant that PEFT does not have cannot be exported to PEFT: the rest of a sentence about it."""
    typical_lr_scale: ClassVar[float] = 1.0
    """Order of magnitude of the best learning rate divided by LoRA's."""
    numerics: ClassVar[int] = 1
    """Raised by hand when a change alters results; records of a lower number then no longer count."""
    revision: ClassVar[str] = ""
    """Version of code from outside this package, which the fingerprint includes; empty for other variants."""
    source_path: ClassVar[str] = ""
    """The path from which this process loaded a user's file; empty for other variants."""
    source_code: ClassVar[bytes] = b""
    """The content of that file; empty for other variants."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        *_, folder, file = ("", *cls.__module__.split("."))
        arxiv = re.search(r"arXiv (\d\d)", vars(cls).get("paper", ""))
        defaults = {
            "name": file, "axis": folder, "paper": "", "deviations": "",
            "year": 2000 + int(arxiv[1]) if arxiv else None, "verified_by": VerifiedBy.NONE,
        }  # fmt: skip
        for name, default in defaults.items():
            if name not in vars(cls):
                setattr(cls, name, default)
        check_mixins(cls, (*MIXINS, PeftFormat))

    @property
    def extra_defaults(self) -> ExtraSettings:
        """Defaults of the hyperparameters that only this variant has."""
        return {name: each.default for name, each in self.hyperparameters.items()}

    def scaling(self, settings: VariantSettings) -> float:
        """Return the factor s in front of the update: alpha / rank, and 1 for a variant without alpha."""
        if not self.uses_alpha:
            return 1.0
        assert settings.alpha is not None
        return settings.alpha / settings.rank

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
        complete = VariantSettings(
            rank if self.uses_rank else 0,
            alpha if self.uses_alpha else None,
            dropout if self.uses_dropout else 0.0,
            complete_extra(self.name, self.hyperparameters, settings.extra),
        )
        self.check_settings(complete)
        return complete

    def check_settings(self, settings: VariantSettings) -> None:
        """Check the rules that link several settings. Each setting on its own has been checked before.

        Raises:
            UnsupportedError: The settings break a rule.
        """

    def largest_rank(self, layer: FrozenLayer) -> int | None:
        """Return the largest rank that a layer permits; None if any rank is permitted.

        By default a variant with the hyperparameter `rank_factor` permits any rank.
        """
        return min(layer.shape) if self.uses_rank and "rank_factor" not in self.hyperparameters else None

    def check_layer(self, layer: FrozenLayer) -> None:
        """Check that the settings fit a layer, before the model is adapted.

        `largest_rank` and `Int.divides` are checked besides.

        Raises:
            UnsupportedError: They do not fit; the message names the layer, the size and the rule.
        """

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        """Return one lane's initial tensors of one layer; by default LoRA's A and B (`LayerRandom.lora`).

        Args:
            layer: The frozen layer, with the lane's settings.
            random: Random values for this lane and layer, for example `random.kaiming("A", (rank, in))`.
        """
        return random.lora()

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        """Compute the tensors for `forward` that depend on the parameters and not on the layer's input.

        Training calls the method at every forward pass, inside the graph; evaluation calls it once for many
        passes.

        Args:
            params: The lanes' tensors, (K, ...).
            layer: The frozen layer. Its factor s, (K, 1, 1), is for tensors (K, rows, columns). For a tensor
                of four dimensions such as (K, experts, out, rank) use `layer.scaling.view(-1, 1, 1, 1)`:
                otherwise PyTorch aligns the lanes with the experts.
        """
        return params

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

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        """Return W' - W of one lane as (out, in) in `layer.dtype`.

        By default it is what `forward` adds to the rows of W^T, the frozen layer's output for the identity.

        Args:
            params: The lane's tensors before `prepare`, without the lane dimension.
            layer: The frozen layer, with the lane's settings and its factor s, ().

        Raises:
            MergeError: The update of this layer is not a matrix that could be added to the weight.
        """
        rows = layer.weight.to(layer.dtype).t().unsqueeze(0)
        eye = torch.eye(layer.shape[1], dtype=layer.dtype, device=layer.device).unsqueeze(0)
        return (apply_lane(self, eye, rows, params, layer) - rows)[0].t()


def apply_lane(variant: Variant, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
    """Return `forward` of one lane over a layer without bias, with the weight in the lanes' dtype.

    Args:
        variant: The variant.
        x: (1, N, in).
        base: (1, N, out).
        params: The lane's tensors before `prepare`, without the lane dimension.
        layer: The frozen layer, with the lane's settings and its factor s, ().
    """
    layer = replace(layer.add_lane_dimension(), stored_weight=layer.weight.to(layer.dtype), bias=None)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    if isinstance(variant, GradientConstants):
        stacked.update(variant.gradient_constants(stacked, layer))
    return variant.forward(x, base, variant.prepare(stacked, layer), layer)
