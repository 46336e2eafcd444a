"""Descriptions of the catalogue's entries, from their docstrings and attributes.

`python -m variants` prints them, and the tables of docs/variants.md are made from them. Descriptions are
cached, so that torch is imported only if the source files have changed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from variants import catalogue
from variants.export_forms import ExportForm, ExportForms, export_forms
from variants.source_cache import cached
from variants.traits import AdaptationScope, Start, VerifiedBy
from variants.variant_names import PEFT_AXIS, PEFT_PREFIX
from variants.variant_settings import VariantSettings

if TYPE_CHECKING:
    from variants.api import Variant

RANK, SIDE, LAYERS = 8, 4096, 32
"""The size at which parameters are counted: the rank, both sides of a layer, and the number of layers, which
is that of a model of 8 billion parameters. The layers are of one type and in blocks of their own."""

CHECKED_TEXT = {
    VerifiedBy.REFERENCE_IMPLEMENTATION: "PEFT",
    VerifiedBy.AUTHORS_CODE: "authors' code",
    VerifiedBy.PAPER: "paper",
    VerifiedBy.NONE: "nothing",
}
START_TEXT = {
    Start.BASE: "W' = W at step 0, bit for bit",
    Start.ROUNDED: "W' = W at step 0, up to rounding",
    Start.OTHER: "W' differs from W at step 0",
}
_PAPER_ID = re.compile(r"(arXiv|OpenReview|doi) ([\w./]+)$")
_ADDRESSES = {
    "arXiv": "https://arxiv.org/abs/",
    "OpenReview": "https://openreview.net/forum?id=",
    "doi": "https://doi.org/",
}
_INITIALIZATION = re.compile(
    r"Initialization(?P<like> [\w ]*as in [^.;,\n]+)?:?\s*(?P<text>.*?)(?:\n\s*\n|\Z)", re.S
)


@dataclass(frozen=True)
class HyperparameterText:
    """A hyperparameter that only one variant has."""

    name: str
    default: float | int | str | bool
    rule: str
    """The permitted values in words."""
    help: str


@dataclass(frozen=True)
class Description:
    """An entry of the catalogue for readers and programs."""

    name: str
    title: str
    axis: str
    paper: str
    """Authors, and arXiv number, OpenReview id, DOI or venue; empty for a control."""
    year: int | None
    summary: str
    """One clause that says what the variant does."""
    rule: str
    """The docstring of the variant's class: equation, initialization, defaults, sources."""
    deviations: str
    """What differs from the source."""
    parameter_count: int | None
    """Trainable values of `LAYERS` layers with sides `SIDE` at rank `RANK`; None for a control, or if the
    initialization needs the values of the weights."""
    initialization: str
    """The beginning of the docstring's part on the initialization."""
    start: str
    """The function at step 0: base, rounded or other (`Start`)."""
    batching: str
    is_control: bool
    """Whether the entry trains something else than the target layers."""
    checked: str
    """What the implementation was compared with (`VerifiedBy`)."""
    peft: str
    """The method's `PeftType` in the PEFT library; empty if lanes cannot be exported in PEFT's format."""
    exports: ExportForms
    """The forms in which a trained lane can be exported: for PEFT, for vLLM, merged."""
    calibration: str
    """The matrix from which the initialization is computed (`CalibrationStatistic`)."""
    uses_rank: bool
    uses_alpha: bool
    uses_dropout: bool
    hyperparameters: tuple[HyperparameterText, ...]

    @property
    def link(self) -> str:
        """The address of the paper; empty if it is unknown."""
        return paper_link(self.paper)


def describe_all() -> list[Description]:
    """Return the descriptions of all entries, sorted by axis and name, LoRA and the controls first."""
    found = [describe(name) for name in catalogue.names()]
    return sorted(
        found, key=lambda each: (each.axis != "baseline", each.axis, each.name != "lora", each.name)
    )


def describe(name: str) -> Description:
    """Return the description of the entry `name`.

    Raises:
        ValueError: There is no such entry.
    """
    return _built_in().get(name) or _describe(name)


@cache
def _built_in() -> Mapping[str, Description]:
    def make() -> list[dict[str, Any]]:
        return [asdict(_describe(name)) for name in catalogue.built_in_names()]

    return {each["name"]: _from_json(each) for each in cached("descriptions", make)}


def _from_json(fields: dict[str, Any]) -> Description:
    exports = ExportForms(**{form: ExportForm(**each) for form, each in fields["exports"].items()})
    own = tuple(HyperparameterText(**each) for each in fields["hyperparameters"])
    return Description(**{**fields, "exports": exports, "hyperparameters": own})


def _describe(name: str) -> Description:
    variant = catalogue.get(name)
    docstring = inspect.getmodule(type(variant)).__doc__ or ""
    summary = "the layer of the PEFT library computes the update" if variant.axis == PEFT_AXIS else ""
    shapes = {f"layers.{block}.linear": (SIDE, SIDE) for block in range(LAYERS)}
    return Description(
        name=name,
        title=f"PEFT's {name.removeprefix(PEFT_PREFIX)}" if variant.axis == PEFT_AXIS else variant.title,
        axis=variant.axis,
        paper=variant.paper,
        year=variant.year,
        summary=summary or " ".join(docstring.strip().split("\n\n")[0].split()).partition(": ")[2],
        rule=inspect.cleandoc(type(variant).__doc__ or ""),
        deviations=inspect.cleandoc(variant.deviations),
        parameter_count=count_parameters(variant, VariantSettings(rank=RANK), shapes),
        initialization=find_initialization(type(variant)),
        start=variant.start.value,
        batching=variant.batching.value,
        is_control=variant.adaptation_scope is not AdaptationScope.TARGET_LAYERS,
        checked=variant.verified_by.value,
        peft=peft.peft_type if (peft := getattr(variant, "peft", None)) else "",
        exports=export_forms(variant),
        calibration=str(getattr(variant, "calibration_statistic", "none")),
        uses_rank=variant.uses_rank,
        uses_alpha=variant.uses_alpha,
        uses_dropout=variant.uses_dropout,
        hyperparameters=tuple(
            HyperparameterText(key, each.default, each.rule, each.help)
            for key, each in variant.hyperparameters.items()
        ),
    )


def paper_link(paper: str) -> str:
    """Return the address of a paper from the arXiv number, OpenReview id or DOI at the end of its source."""
    found = _PAPER_ID.search(paper)
    return _ADDRESSES[found[1]] + found[2] if found else ""


def find_initialization(variant_class: type[Variant]) -> str:
    """Return the first sentence on the initialization in the docstring of a class, or of its bases."""
    from variants.api import Variant

    for each in variant_class.__mro__:
        found = _INITIALIZATION.search(inspect.cleandoc(each.__doc__ or ""))
        if found and each is not Variant:
            text = f"{found['like'].strip()}. " if found["like"] else found["text"]
            sentence = re.split(r"(?<=[^.])\.(?:\s|$)|, so W' = W", " ".join(text.split()))[0]
            return sentence.removeprefix("and parameters ").rstrip(".")
    return ""


def count_parameters(
    variant: Variant, settings: VariantSettings, shapes: Mapping[str, tuple[int, int]], has_bias: bool = False
) -> int | None:
    """Return the number of trainable values of a lane in the given layers.

    The layers are initialized on the device "meta", where tensors have shapes and no values. Of a layer with
    masked ranks, as many ranks count as the settings state, which is their mean at the end of the training.

    Args:
        variant: The variant.
        settings: The lane's settings.
        shapes: (out, in) of each layer by dotted path.
        has_bias: Whether the layers have a bias.

    Returns:
        The number; None for a control, for settings that do not fit the layers, or if the number depends on
        the values of the weights.
    """
    import torch

    from variants.adapters import init_layers
    from variants.api import RANK_MASK, Calibrated, CalibrationStatistic, FrozenLayer, UnsupportedError

    if variant.adaptation_scope is not AdaptationScope.TARGET_LAYERS:
        return None
    settings = variant.validate_settings(settings)
    layers: dict[str, FrozenLayer] = {}
    try:
        for name, shape in shapes.items():
            weight = torch.empty(shape, device="meta")
            layer = FrozenLayer(name, weight, weight[:, 0] if has_bias else None, settings=settings)
            if isinstance(variant, Calibrated) and variant.calibration_statistic.needs_data:
                rows = shape[variant.calibration_statistic is not CalibrationStatistic.MEAN_GRADIENT]
                general = layer.with_settings(replace(settings, alpha=None))
                reduced = variant.reduce_calibration(general, torch.empty(rows, shape[1], device="meta"))
                layer = replace(layer, calibration=reduced)
            layers[name] = layer
        initial = init_layers(variant, layers, seed=0).values()
    except (RuntimeError, UnsupportedError):
        return None
    count = 0
    for each in initial:
        size, mask = sum(tensor.numel() for tensor in each.trainable.values()), each.frozen.get(RANK_MASK)
        count += size if mask is None else size // mask.numel() * settings.rank
    return count
