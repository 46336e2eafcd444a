"""Descriptions of the catalogue's entries and of the survey's taxonomy.

`python -m variants` prints them, and docs/site_links.py makes the site's tables of them.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants import catalogue
from variants.traits import PEFT_AXIS, PEFT_PREFIX, AdaptationScope, Start, VerifiedBy
from variants.variant_settings import VariantSettings

if TYPE_CHECKING:
    from variants.api import Variant

RANK, SIDE, LAYERS = 8, 4096, 32
"""The size at which parameters are counted: the rank, both sides of a layer, and the number of layers, which
is that of a model of 8 billion parameters. The layers are of one type and in blocks of their own."""
VLLM_LARGEST_RANK = 512
TAXONOMY_FILE = Path(__file__).with_name("taxonomy.toml")

AXES = {
    "baseline": "what the variants are compared with",
    "rank": "another structure of the update, or another rank in each layer",
    "optimization": "another way to train the two factors",
    "initialization": "other initial values",
    "experts": "several adapters, mixed for each token",
    "multiplicative": "a learned map of the layer's input or output, outside the survey",
    "user": "variants of installed packages",
}
"""What the entries of an axis change."""
STARTS = {
    Start.BASE: "W' = W at step 0, bit for bit",
    Start.ROUNDED: "W' = W at step 0, up to rounding",
    Start.OTHER: "W' differs from W at step 0",
}
CHECKS = {
    VerifiedBy.REFERENCE_IMPLEMENTATION: "PEFT",
    VerifiedBy.AUTHORS_CODE: "authors' code",
    VerifiedBy.PAPER: "paper",
    VerifiedBy.NONE: "nothing",
}
_ADDRESSES = {
    "arXiv": "https://arxiv.org/abs/",
    "OpenReview": "https://openreview.net/forum?id=",
    "doi": "https://doi.org/",
}


@dataclass(frozen=True)
class Description:
    """An entry of the catalogue for readers and programs; all values are of JSON types."""

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
    """The docstring of the variant's class: equation, initialization, defaults, source."""
    deviations: str
    """What differs from that source."""
    parameter_count: int | None
    """Trainable values of `LAYERS` layers with sides `SIDE` at rank `RANK`; see `count_parameters`."""
    start: str
    """The function at step 0: base, rounded or other (`Start`)."""
    batching: str
    is_control: bool
    """Whether the entry trains something else than the target layers."""
    checked: str
    """What the implementation was compared with (`VerifiedBy`)."""
    peft: str
    """The method's `PeftType` in the PEFT library; empty if lanes cannot be exported in PEFT's format."""
    exports: dict[str, dict[str, Any]]
    """See `export_forms`."""
    calibration: str
    """The matrix from which the initialization is computed (`CalibrationStatistic`)."""
    uses_rank: bool
    uses_alpha: bool
    uses_dropout: bool
    hyperparameters: list[dict[str, Any]]
    """Name, default, rule (the permitted values) and help of those that only this entry has."""

    @property
    def checked_text(self) -> str:
        """What the implementation was compared with, in words."""
        is_reference = self.checked == VerifiedBy.REFERENCE_IMPLEMENTATION
        return "plain AdamW" if self.is_control and is_reference else CHECKS[VerifiedBy(self.checked)]


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

    return {each["name"]: Description(**each) for each in catalogue.cached("descriptions", make)}


def _describe(name: str) -> Description:
    variant = catalogue.get(name)
    is_tuner = variant.axis == PEFT_AXIS
    docstring = inspect.getmodule(type(variant)).__doc__ or ""
    first_sentence = " ".join(docstring.strip().partition("\n\n")[0].split())
    summary = first_sentence.partition(": ")[2].rstrip(".")
    authors, _, paper = variant.paper.partition(", ")
    shapes = {f"layers.{block}.linear": (SIDE, SIDE) for block in range(LAYERS)}
    return Description(
        name=name,
        title=f"PEFT's {name.removeprefix(PEFT_PREFIX)}" if is_tuner else variant.title,
        axis=variant.axis,
        authors=f"{authors} {variant.year}" if authors else "",
        paper=paper,
        summary="the layer of PEFT computes the update" if is_tuner else summary,
        rule=inspect.cleandoc(type(variant).__doc__ or ""),
        deviations=inspect.cleandoc(variant.deviations),
        parameter_count=count_parameters(variant, VariantSettings(rank=RANK), shapes),
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
        hyperparameters=[
            {"name": key, "default": each.default, "rule": each.rule, "help": each.help}
            for key, each in variant.hyperparameters.items()
        ],
    )


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


def export_forms(variant: Variant) -> dict[str, dict[str, Any]]:
    """Return in which forms the lanes of a variant can be exported, besides the exact file of a lane.

    Returns:
        "peft" (an adapter that PeftModel and AutoPeftModel load), "vllm" (the same folder, served by vLLM)
        and "merged" (a plain model of transformers) -> "possible", and "note": a reason or a condition.
    """
    from variants.peft_format import PeftFormat, peft_obstacle

    if not isinstance(variant, PeftFormat) or variant.peft is None:
        peft, vllm = (False, peft_obstacle(variant)), (False, "not in PEFT's format")
    else:
        peft = True, "" if variant.peft.adapts_conv1d else "not on layers of type Conv1D, as in GPT-2"
        refusal = vllm_obstacle(variant.peft_config(variant.validate_settings(VariantSettings(rank=RANK))))
        vllm = not refusal, refusal or "without a trained head"
    merged = not variant.merge_obstacle, variant.merge_obstacle
    forms = {"peft": peft, "vllm": vllm, "merged": merged}
    return {form: {"possible": possible, "note": note} for form, (possible, note) in forms.items()}


def vllm_obstacle(config: Mapping[str, Any]) -> str:
    """Return the reason why vLLM refuses an adapter; empty if it loads the adapter.

    vLLM was not run. The rule is that of the class `PEFTHelper` in its documentation
    (https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/). It is about the adapter alone: vLLM must also
    support LoRA for the class of the model.

    Args:
        config: The content of adapter_config.json.
    """
    rank = config.get("r") or 0
    rules = (
        (config["peft_type"] != "LORA", "vLLM loads LoRA, and no other method of PEFT"),
        (config.get("use_dora"), "vLLM does not load DoRA"),
        (config.get("modules_to_save"), "vLLM loads no trained head (`modules_to_save`)"),
        (config.get("bias", "none") != "none" or config.get("lora_bias"), "vLLM loads no biases"),
        (config.get("rank_pattern"), "vLLM loads one rank for all layers"),
        (rank > VLLM_LARGEST_RANK, f"the adapter's rank {rank} is above {VLLM_LARGEST_RANK}"),
    )
    return next((reason for applies, reason in rules if applies), "")


@dataclass(frozen=True)
class Method:
    """A published method, with its entry in the catalogue or the reason why there is none."""

    title: str
    axis: str
    """The axis of the survey's taxonomy, and the folder of the entry if there is one."""
    leaf: str
    """The part of the axis; "other" if section II of the survey does not place the method."""
    paper: str
    """arXiv number, OpenReview id, DOI or venue; empty if the method has no paper."""
    variant: str = ""
    """The name of the entry in the catalogue; empty if there is none."""
    reason: str = ""
    """Why there is no entry; empty if there is one."""
    also: tuple[str, ...] = ()
    """Other places where the survey names the method, each as "axis.leaf"."""
    survey_code: bool = False
    """Whether the survey's own code has the method."""
    evaluated: bool = False
    """Whether the method is one of the twenty that the survey trained."""
    peft: str = ""
    """The method's `PeftType` in the PEFT library; empty if PEFT does not have it."""


@cache
def read_methods() -> tuple[Method, ...]:
    """Return all methods of `taxonomy.toml` in the order of the file, which is sorted by axis and leaf."""
    return tuple(
        Method(title, axis, leaf, **{**fields, "also": tuple(fields.get("also", ()))})
        for axis, leaves in tomllib.loads(TAXONOMY_FILE.read_text()).items()
        for leaf, methods in leaves.items()
        for title, fields in methods.items()
    )


def paper_link(paper: str) -> str:
    """Return the address of a paper from its arXiv number, OpenReview id or DOI; empty for a venue."""
    found = re.search(r"(arXiv|OpenReview|doi) ([\w./]+)$", paper)
    return _ADDRESSES[found[1]] + found[2] if found else ""


def form_text(form: Mapping[str, Any]) -> str:
    """Return "yes" or "no" for a form of export, followed by its note: "no: vLLM does not load DoRA"."""
    answer, link = ("yes", ", ") if form["possible"] else ("no", ": ")
    return f"{answer}{link}{form['note']}" if form["note"] else answer


def value_text(value: float | int | str | bool) -> str:
    """Return the default of a hyperparameter as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
