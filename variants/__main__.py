"""The catalogue of variants: what each one computes, and what it was checked against.

python -m variants                  # all entries by axis
python -m variants lora_plus        # one entry: equation, hyperparameters, an example
python -m variants peft:LOHA        # a tuner of the PEFT library; likewise ./my_variant.py, a file of yours
python -m variants --taxonomy       # the survey's methods, with the reason where one has no entry
python -m variants --json           # all entries for programs (also with a name or --taxonomy)
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants import catalogue
from variants.variant_settings import (
    FILE_SUFFIX,
    PEFT_AXIS,
    PEFT_PREFIX,
    AdaptationScope,
    VariantSettings,
    canonical_name,
)

if TYPE_CHECKING:
    from variants.api import Variant

Description = Mapping[str, Any]
"""An entry of the catalogue, or a method of the taxonomy, as a JSON object."""

EXIT_USAGE = 2
"""Exit code for a name that does not exist, and for options that exclude each other."""
WIDTH = 80
RANK, SIDE, LAYERS = 8, 4096, 32
"""The size at which parameters are counted: the rank, both sides of a layer, and the number of layers, which
is that of a model of 8 billion parameters. The layers are of one type and in blocks of their own."""
VLLM_LARGEST_RANK = 512

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
    "base": "W' = W at step 0, bit for bit",
    "rounded": "W' = W at step 0, up to rounding",
    "other": "W' differs from W at step 0",
}
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


def main(words: Sequence[str]) -> int:
    """Run the command line `words`, and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m variants", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help="the entry, tuner (peft:TYPE) or .py file to explain; without it the whole catalogue is listed",
    )
    for option, text in (
        ("--taxonomy", "list the methods of the survey, of its code and of the PEFT library"),
        ("--json", "print JSON: an object for an entry, a list of objects otherwise"),
    ):
        parser.add_argument(option, action="store_true", help=text)
    arguments = parser.parse_args(words)
    try:
        text = _text(arguments.name, arguments.taxonomy, arguments.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `python -m variants | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _text(name: str, taxonomy: bool, as_json: bool) -> str:
    """Return what a command prints.

    Raises:
        ValueError: There is no entry of the given name, or the options exclude each other.
    """
    if name and taxonomy:
        raise ValueError("a name and --taxonomy exclude each other")
    if name.endswith(FILE_SUFFIX):
        catalogue.load(name)
    if name:
        entry = describe(canonical_name(name))
        return json.dumps(entry, indent=1) if as_json else format_entry(entry)
    found = read_methods() if taxonomy else describe_all()
    if as_json:
        return json.dumps(found, indent=1)
    return format_taxonomy(found) if taxonomy else format_catalogue(found)


def describe_all() -> list[Description]:
    """Return the descriptions of all entries, sorted by axis and name, LoRA and the controls first."""
    found = [describe(name) for name in catalogue.names()]
    return sorted(
        found,
        key=lambda each: (each["axis"] != "baseline", each["axis"], each["name"] != "lora", each["name"]),
    )


def describe(name: str) -> Description:
    """Return the description of an entry. A field that does not apply is empty.

    "rule" is the docstring of the variant's class. "checked" is the value of its `verified_by`.
    "parameter_count" is the number of trainable values in `LAYERS` layers of `SIDE` x `SIDE` at rank `RANK`.

    Raises:
        ValueError: There is no such entry.
    """
    return _built_in().get(name) or _describe(name)


@cache
def _built_in() -> Mapping[str, Description]:
    found: Mapping[str, Description] = catalogue.cached(
        "descriptions", lambda: {name: _describe(name) for name in catalogue.built_in_names()}
    )
    return found


def _describe(name: str) -> Description:
    variant = catalogue.get(name)
    is_tuner = variant.axis == PEFT_AXIS
    docstring = inspect.getmodule(type(variant)).__doc__ or ""
    first_sentence = " ".join(docstring.strip().partition("\n\n")[0].split())
    summary = first_sentence.partition(": ")[2].rstrip(".")
    authors, _, paper = variant.paper.partition(", ")
    shapes = {f"layers.{block}.linear": (SIDE, SIDE) for block in range(LAYERS)}
    return {
        "name": name,
        "title": f"PEFT's {name.removeprefix(PEFT_PREFIX)}" if is_tuner else variant.title,
        "axis": variant.axis,
        "authors": f"{authors} {variant.year}" if authors else "",
        "paper": paper,
        "summary": "the layer of PEFT computes the update" if is_tuner else summary,
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


def read_methods() -> list[Description]:
    """Return the methods of `taxonomy.toml`, sorted by axis and leaf. Its head explains the fields."""
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


def format_catalogue(found: Iterable[Description]) -> str:
    """Return the catalogue: a few lines for each entry, by axis."""
    lines = _fill(
        f"Trainable values of {LAYERS} layers of {SIDE:,} x {SIDE:,} at rank {RANK}; how lanes share a "
        "computation; whether the update can be merged into the weight; what the implementation was checked "
        "against. `python -m variants NAME` explains an entry."
    )
    for axis, group in groupby(found, lambda each: each["axis"]):
        lines += ["", f"{axis.upper()}: {AXES[axis]}"]
        lines.append(_row("", "parameters", "batching", "merges", "checked"))
        for each in group:
            merges = "yes" if each["exports"]["merged"]["possible"] else "no"
            lines.append(_row(each["name"], _count(each), each["batching"], merges, checked_text(each)))
            lines += _fill(f"    {each['title']}{_in_brackets(each['paper'])}: {each['summary']}", "      ")
    return "\n".join(lines)


def format_entry(each: Description) -> str:
    """Return the explanation of one entry: docstring, hyperparameters and an example."""
    lines = [f"{each['title']} ({each['name']}), axis {each['axis']}"]
    if each["authors"]:
        lines += [line for line in (f"{each['authors']}, {each['paper']}", paper_link(each["paper"])) if line]
    deviations = "Deviations: " + each["deviations"] if each["deviations"] else ""
    deviations = deviations.replace(": - ", ":\n- ", 1)
    for text in (f"{each['summary'][:1].upper()}{each['summary'][1:]}.", each["rule"], deviations):
        lines += ["", *_wrap_docstring(text)] if text else []
    lines.append("")
    for label, fact in _facts(each):
        lines += _fill(f"{label:12} {fact}", " " * 13)
    if each["hyperparameters"]:
        lines += ["", "Hyperparameters of its own:"]
    for own in each["hyperparameters"]:
        meaning = f". {own['help'][:1].upper()}{own['help'][1:]}" if own["help"] else ""
        lines += _fill(f"    {own['name']} = {value_text(own['default'])}: {own['rule']}{meaning}", "      ")
    return "\n".join([*lines, "", "Example:", f"  {example_command(each)}"])


def _facts(each: Description) -> Iterable[tuple[str, str]]:
    used = {"rank": each["uses_rank"], "alpha": each["uses_alpha"], "dropout": each["uses_dropout"]}
    yield "settings", ", ".join(name for name in used if used[name]) or "none of rank, alpha and dropout"
    if each["parameter_count"] is not None:
        yield "parameters", f"{_count(each)} in {LAYERS} layers of {SIDE:,} x {SIDE:,} at rank {RANK}"
    yield "start", STARTS[each["start"]]
    if each["calibration"] != "none":
        yield "calibration", f"computed from each layer's {each['calibration']}"
    yield "batching", each["batching"]
    merged, peft = each["exports"]["merged"], each["exports"]["peft"]
    yield "merging", "the update can be merged into the weight" if merged["possible"] else form_text(merged)
    yield "checked", f"against {checked_text(each)}"
    loads = f"exported as {each['peft']}, which PeftModel and AutoPeftModel load{_in_brackets(peft['note'])}"
    yield "PEFT", loads if peft["possible"] else form_text(peft)
    yield "vLLM", form_text(each["exports"]["vllm"])


def example_command(each: Description) -> str:
    """Return a command that trains the entry beside LoRA on a small task."""
    task = " --task reviews" if each["name"] == "head_only" else ""
    variants = each["name"] if each["name"] == "lora" else f"lora {each['name']}"
    own = next(iter(each["hyperparameters"]), None)
    words = f" --set {each['name']}.{own['name']}={value_text(own['default'])}" if own else ""
    return f"lora-orchestrator study --dry-run{task} --variants {variants}{words}"


def format_taxonomy(methods: Sequence[Description]) -> str:
    """Return the taxonomy: a line or two for each method, with the entry or the reason for its absence."""
    there = sum(bool(each["variant"]) for each in methods)
    evaluated = sum(each["evaluated"] for each in methods)
    lines = _fill(
        f"{len(methods)} methods by what they change, {there} of them in the catalogue. Marks: e, one of the "
        f"{evaluated} that the survey (arXiv 2601.22708) evaluated; c, in the survey's code."
    )
    for (axis, leaf), group in groupby(methods, lambda each: (each["axis"], each["leaf"])):
        lines += ["", f"{axis}: {leaf}".replace("_", " ")]
        for each in group:
            marks = ("e" if each["evaluated"] else " ") + ("c" if each["survey_code"] else " ")
            outcome = f"-> {each['variant']}" if each["variant"] else each["reason"]
            lines += _fill(f"{marks} {each['title']}{_in_brackets(each['paper'])} {outcome}", "     ")
    return "\n".join(lines)


def _wrap_docstring(text: str) -> list[str]:
    """Return the lines of a docstring, its paragraphs and the items of its lists filled."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        for item in paragraph.replace("\n- ", "\0- ").split("\0"):
            lines += _fill(" ".join(item.split()), "  " if item.startswith("- ") else "")
        lines.append("")
    return lines[:-1]


def _count(each: Description) -> str:
    return "-" if each["parameter_count"] is None else f"{each['parameter_count']:,}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _row(name: str, count: str, batching: str, merges: str, checked: str) -> str:
    return f"{name:18}{count:>13}  {batching:11}{merges:7}{checked}".rstrip()


def _fill(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
