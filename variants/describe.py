"""Descriptions of the catalogue's entries, from their docstrings and attributes.

`python -m variants` prints them, and the tables of docs/variants.md are made from them. Descriptions are
cached, so that torch is imported only if the source files have changed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
"""The size at which parameters are counted: the rank, both sides of a layer, and the number of layers (as
many as a model of 8 billion parameters has of one type)."""

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
_PAPER_ID = re.compile(
    r"(?P<arxiv>arXiv \d{4}\.\d{4,5})|(?P<review>openreview \w+)|(?P<doi>doi [\w./]+)", re.IGNORECASE
)
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
    authors: str
    """Authors and year; empty for a control."""
    paper: str
    """arXiv number, OpenReview id, DOI or venue; empty for a control."""
    summary: str
    """One clause that says what the variant does."""
    rule: str
    """The docstring of the variant's class: equation, initialization, defaults, deviations."""
    parameters: str
    """Formula of the number of trainable values of one layer."""
    parameter_count: int | None
    """Its value at rank `RANK` for a layer with sides `SIDE`, one of `LAYERS`; None without a formula."""
    shared_parameters: str
    """The same for each group of layers that share trainable tensors; empty without such tensors."""
    shared_parameter_count: int | None
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
    title, authors, paper, summary = _read_heading(variant)
    return Description(
        name=name,
        title=title,
        axis=variant.axis,
        authors=authors,
        paper=paper,
        summary=summary,
        rule=inspect.cleandoc(type(variant).__doc__ or ""),
        parameters=variant.parameters,
        parameter_count=_layer_count(variant),
        shared_parameters=variant.shared_parameters,
        shared_parameter_count=_count(variant, variant.shared_parameters),
        initialization=find_initialization(type(variant)),
        start=variant.start.value,
        batching=variant.batching.value,
        is_control=variant.adaptation_scope is not AdaptationScope.TARGET_LAYERS,
        checked=variant.verified_by.value,
        peft=peft.peft_type if (peft := getattr(variant, "peft", None)) else "",
        exports=export_forms(variant),
        calibration=variant.calibration_statistic.value,
        uses_rank=variant.uses_rank,
        uses_alpha=variant.uses_alpha,
        uses_dropout=variant.uses_dropout,
        hyperparameters=tuple(
            HyperparameterText(key, each.default, each.rule, each.help)
            for key, each in variant.hyperparameters.items()
        ),
    )


def _read_heading(variant: Variant) -> tuple[str, str, str, str]:
    """Return title, authors, paper and summary; without a docstring, the class's name is the title."""
    if variant.axis == PEFT_AXIS:
        peft_type = variant.name.removeprefix(PEFT_PREFIX)
        return f"PEFT's {peft_type}", "", "", "the layer of the PEFT library computes the update"
    docstring = inspect.getmodule(type(variant)).__doc__ or ""
    title, authors, paper, summary = parse_module_docstring(docstring)
    return title or type(variant).__name__, authors, paper, summary


def parse_module_docstring(docstring: str) -> tuple[str, str, str, str]:
    """Return title, authors with the year, paper and summary from "Title (Authors, source): summary"."""
    first = " ".join(docstring.strip().split("\n\n")[0].split())
    head, colon, summary = first.partition("): ")
    if not colon or " (" not in head:
        title, _, summary = first.partition(": ")
        return title, "", "", summary
    title, _, source = head.partition(" (")
    return title, *split_source(source), summary


def split_source(source: str) -> tuple[str, str]:
    """Split "Hu et al. 2021, arXiv 2106.09685" into authors with the year, and the paper."""
    found = _PAPER_ID.search(source)
    paper = found[0] if found else source.rpartition(", ")[2]
    authors = source[: found.start()] if found else source.rpartition(", ")[0]
    return authors.strip(" ,"), re.sub("^openreview", "OpenReview", paper, flags=re.IGNORECASE)


def paper_link(paper: str) -> str:
    """Return the address of a paper from its arXiv number, OpenReview id or DOI; empty for a venue."""
    kind, _, number = paper.partition(" ")
    address = {"arxiv": "https://arxiv.org/abs/", "openreview": "https://openreview.net/forum?id="}
    address["doi"] = "https://doi.org/"
    return address[kind.lower()] + number if _PAPER_ID.fullmatch(paper) else ""


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


def _layer_count(variant: Variant) -> int | None:
    """Return the number of a layer's trainable values at the size in `RANK`, `SIDE` and `LAYERS`.

    None if the variant has no formula for it and does not count them itself.
    """
    import torch

    from variants.api import FrozenLayer, Variant

    counts_itself = type(variant).layer_parameters is not Variant.layer_parameters
    if not variant.parameters and not counts_itself:
        return None
    settings = variant.validate_settings(VariantSettings(rank=RANK))
    weight = torch.empty(SIDE, SIDE, device="meta")
    layer = FrozenLayer("layer", weight, None, settings=settings)
    return variant.layer_parameters(layer, RANK, LAYERS)


def _count(variant: Variant, formula: str) -> int | None:
    """Return the value of a formula at the size in `RANK`, `SIDE` and `LAYERS`; None without a formula."""
    if not formula:
        return None
    from variants.parameter_formula import evaluate_formula

    settings = variant.validate_settings(VariantSettings(rank=RANK))
    names = variant.formula_names(settings)
    return evaluate_formula(formula, RANK, (SIDE, SIDE), LAYERS, names)
