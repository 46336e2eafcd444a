"""Descriptions of the variants and of the survey's methods as JSON objects, and texts for their fields."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants import catalogue
from variants.variant_settings import PEFT_AXIS, PEFT_PREFIX, AdaptationScope, VariantSettings

if TYPE_CHECKING:
    from variants.api import Variant

Description = Mapping[str, Any]
"""An entry of the catalogue, or a method of the taxonomy, as a JSON object."""

RANK, SIDE, LAYERS = 8, 4096, 32
"""The size at which parameters are counted: the rank, both sides of a layer, and the number of layers, which
is that of a model of 8 billion parameters. The layers are of one type and in blocks of their own."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` may have (`MaxLoRARanks` in vllm/config/lora.py)."""

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
CHECKS = {
    "reference_implementation": "PEFT",
    "authors_code": "authors' code",
    "paper": "paper",
    "none": "nothing",
}
_ADDRESSES = {
    "arXiv": "https://arxiv.org/abs/",
    "OpenReview": "https://openreview.net/forum?id=",
    "doi": "https://doi.org/",
}


def describe_all() -> list[Description]:
    """Return the descriptions of all entries, sorted by axis and name, LoRA and the controls first."""
    return sorted(
        map(describe, catalogue.names()),
        key=lambda each: (each["axis"] != "baseline", each["axis"], each["name"] != "lora", each["name"]),
    )


def describe(name: str) -> Description:
    """Return the description of an entry. A field that does not apply is empty.

    "rule" is the docstring of the variant's class. "checked" is the value of its `verified_by`.
    "parameter_count" is the number of trainable values in `LAYERS` layers of `SIDE` x `SIDE` at rank `RANK`.

    Raises:
        ValueError: There is no such entry.
    """
    return _built_in().get(name) or _describe(catalogue.get(name))


@cache
def _built_in() -> Mapping[str, Description]:
    names = catalogue.built_in_names()
    return catalogue.cached("descriptions", lambda: {name: _describe(catalogue.get(name)) for name in names})


def _describe(variant: Variant) -> Description:
    docstring = inspect.getmodule(type(variant)).__doc__ or ""
    first_sentence = " ".join(docstring.strip().partition("\n\n")[0].split())
    title, _, summary = first_sentence.partition(": ")
    if variant.axis == PEFT_AXIS:
        title = f"PEFT's {variant.name.removeprefix(PEFT_PREFIX)}"
        summary = "the layer of PEFT computes the update"
    authors, _, paper = variant.paper.partition(", ")
    shapes = {f"layers.{block}.linear": (SIDE, SIDE) for block in range(LAYERS)}
    return {
        "name": variant.name,
        "title": title if summary else type(variant).__name__,
        "axis": variant.axis,
        "authors": f"{authors} {variant.year}" if authors else "",
        "paper": paper,
        "summary": summary.rstrip("."),
        "rule": inspect.cleandoc(type(variant).__doc__ or ""),
        "deviations": inspect.cleandoc(variant.deviations),
        "parameter_count": count_parameters(variant, VariantSettings(rank=RANK), shapes),
        "start": variant.start,
        "batching": variant.batching,
        "is_control": variant.adaptation_scope is not AdaptationScope.TARGET_LAYERS,
        "checked": variant.verified_by,
        "peft": peft.peft_type if (peft := getattr(variant, "peft", None)) else "",
        "exports": export_forms(variant),
        "calibration": getattr(variant, "calibration_statistic", "none"),
        "uses_rank": variant.uses_rank,
        "uses_alpha": variant.uses_alpha,
        "uses_dropout": variant.uses_dropout,
        "hyperparameters": [
            {"name": key, "default": each.default, "rule": each.rule, "help": each.help}
            for key, each in variant.hyperparameters.items()
        ],
    }


def count_parameters(
    variant: Variant, settings: VariantSettings, shapes: Mapping[str, tuple[int, int]], has_bias: bool = False
) -> int | None:
    """Return the number of trainable values of a lane in the given layers.

    The layers are initialized on the device "meta", where tensors have shapes and no values. If a
    variant masks ranks, `settings.rank` ranks of each layer count: the mean number at the end of training.

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
    """Return the forms in which a trained lane can be exported.

    Returns:
        Form -> {"possible": bool, "note": the reason for a refusal or the condition}. The form "peft" is an
        adapter for PeftModel, "vllm" is the same folder served by vLLM, and "merged" is a plain model of
        transformers.
    """
    from variants.peft_format import PeftFormat

    if not isinstance(variant, PeftFormat) or variant.peft is None:
        peft, vllm = (False, variant.peft_obstacle), (False, "not in PEFT's format")
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
        (rank > VLLM_RANKS[-1], f"the adapter's rank {rank} is above {VLLM_RANKS[-1]}"),
    )
    return next((reason for applies, reason in rules if applies), "")


def read_methods() -> list[Description]:
    """Return the methods of `taxonomy.toml`, sorted by axis and leaf.

    The comment at the top of that file explains the fields.
    """
    absent = {"variant": "", "reason": "", "also": [], "survey_code": False, "evaluated": False, "peft": ""}
    return [
        {"title": title, "axis": axis, "leaf": leaf, "paper": "", **absent, **fields}
        for axis, leaves in tomllib.loads(Path(__file__).with_name("taxonomy.toml").read_text()).items()
        for leaf, methods in leaves.items()
        for title, fields in methods.items()
    ]


def checked_text(each: Description) -> str:
    """Return what an implementation was compared with, in words."""
    is_reference = each["checked"] == "reference_implementation"
    return "plain AdamW" if each["is_control"] and is_reference else CHECKS[each["checked"]]


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
