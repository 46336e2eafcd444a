"""Text of `python -m variants` for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from variants.describe import CHECKED_TEXT, LAYERS, RANK, SIDE, START_TEXT, Description
from variants.export_forms import ExportForm
from variants.taxonomy import Method
from variants.traits import Start, VerifiedBy

WIDTH = 80
AXES = {
    "baseline": "what the variants are compared with",
    "rank": "another structure of the update, or another rank in each layer",
    "optimization": "another way to train the two factors",
    "initialization": "other initial values",
    "experts": "several adapters, mixed for each token",
    "multiplicative": "a learned map of the layer's input or output, outside the survey",
    "user": "variants of installed packages",
    "beyond_layers": "changes of other parts of the model than linear layers",
}
"""What the entries of an axis change, by axis; an axis that is not listed is shown without a description."""

INTRODUCTION = (
    f"Trainable values of {LAYERS} layers of {SIDE:,} x {SIDE:,} at rank {RANK}; how "
    "lanes share a computation; whether the update can be merged into the weight; what the implementation "
    "was checked against. `python -m variants NAME` explains an entry."
)


def format_catalogue(entries: Sequence[Description]) -> str:
    """Return the catalogue: three lines for each entry, by axis."""
    lines = _fill(INTRODUCTION, "")
    header = ("", "parameters", "batching", "merges", "checked")
    for axis, group in groupby(entries, lambda each: each.axis):
        lines += ["", _heading(axis, AXES), _row(header)]
        for each in group:
            lines += _entry_lines(each)
    return "\n".join(lines)


def _entry_lines(each: Description) -> list[str]:
    cells = (
        each.name,
        format_count(each.parameter_count),
        each.batching,
        "yes" if each.exports.merged.possible else "no",
        checked_text(each),
    )
    lines = [_row(cells), *_wrap(f"{each.title}{_in_brackets(each.paper)}")]
    start = shorten(each.initialization, WIDTH - len("    start: "))
    return [*lines, f"    start: {start}"] if start else lines


def format_entry(each: Description) -> str:
    """Return the explanation of one entry: docstring, hyperparameters and an example."""
    source = f"{each.paper} ({each.year})" if each.paper else ""
    lines = [f"{each.title} ({each.name}), axis {each.axis}"]
    lines += [line for line in (source, each.link) if line]
    deviations = f"Deviations: {each.deviations}" if each.deviations else ""
    summary = textwrap.wrap(each.summary[:1].upper() + each.summary[1:], WIDTH)
    for paragraph in (summary, wrap_docstring(each.rule, WIDTH), wrap_docstring(deviations, WIDTH)):
        lines += ["", *paragraph] if paragraph else []
    lines += [""]
    for label, text in _facts(each):
        lines += _fill(f"{label:12} {text}", " " * 13)
    if each.hyperparameters:
        lines += ["", "Hyperparameters of its own:"]
    for own in each.hyperparameters:
        help_text = f". {own.help[:1].upper()}{own.help[1:]}" if own.help else ""
        lines += _wrap(f"{own.name} = {format_value(own.default)}: {own.rule}{help_text}")
    return "\n".join([*lines, "", "Example:", f"  {example_command(each)}"])


def _facts(each: Description) -> Iterable[tuple[str, str]]:
    """Yield labels and texts of the facts that follow from the attributes of a variant."""
    used = {"rank": each.uses_rank, "alpha": each.uses_alpha, "dropout": each.uses_dropout}
    names = [name for name, is_used in used.items() if is_used]
    yield "settings", ", ".join(names) or "none of rank, alpha and dropout"
    if each.parameter_count is not None:
        count = format_count(each.parameter_count)
        yield "parameters", f"{count} in {LAYERS} layers of {SIDE:,} x {SIDE:,} at rank {RANK}"
    yield "start", START_TEXT[Start(each.start)]
    if each.calibration != "none":
        yield "calibration", f"computed from each layer's {each.calibration}"
    yield "batching", each.batching
    merged = each.exports.merged
    yield "merging", "the update can be merged into the weight" if merged.possible else f"no: {merged.note}"
    yield "checked", f"against {checked_text(each)}"
    peft = each.exports.peft
    condition = f" ({peft.note})" if peft.note else ""
    loads = f"exported as {each.peft}, which PeftModel and AutoPeftModel load{condition}"
    yield "PEFT", loads if peft.possible else format_form(peft)
    yield "vLLM", format_form(each.exports.vllm)


def example_command(each: Description) -> str:
    """Return a command that trains the entry beside LoRA on a small task."""
    task = " --task reviews" if each.name == "head_only" else ""
    own = next(iter(each.hyperparameters), None)
    words = f" --set {each.name}.{own.name}={format_value(own.default)}" if own else ""
    variants = each.name if each.name == "lora" else f"lora {each.name}"
    return f"lora-orchestrator study --dry-run{task} --variants {variants}{words}"


def format_taxonomy(methods: Sequence[Method]) -> str:
    """Return the taxonomy: a line or two for each method, with the entry or the reason for its absence."""
    there = sum(bool(each.variant) for each in methods)
    twenty = sum(each.evaluated for each in methods)
    lines = _fill(
        f"{len(methods)} methods by what they change, {there} of them in the catalogue. Marks: e, one of the "
        f"{twenty} that the survey (arXiv 2601.22708) evaluated; c, in the survey's code.",
        "",
    )
    for (axis, leaf), group in groupby(methods, lambda each: (each.axis, each.leaf)):
        lines += ["", f"{axis.replace('_', ' ')}: {leaf.replace('_', ' ')}"]
        for each in group:
            marks = ("e" if each.evaluated else " ") + ("c" if each.survey_code else " ")
            text = f"-> {each.variant}" if each.variant else each.reason
            head = f"{marks} {each.title}{_in_brackets(each.paper)}"
            lines += _fill(f"{head} {text}", "     ")
    return "\n".join(lines)


def wrap_docstring(text: str, width: int) -> list[str]:
    """Return the lines of a docstring, its paragraphs and the items of its lists filled to a width."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        items = re.split(r"\n(?=- )", paragraph)
        for item in items:
            indent = "  " if item.startswith("- ") else ""
            text = " ".join(item.split())
            lines += textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
        lines.append("")
    return lines[:-1]


def shorten(text: str, length: int) -> str:
    """Return a text that is too long without remarks in brackets, and if it still is, without its end.

    The text is cut after a part, which a comma or semicolon outside brackets ends, or else after a word.
    """
    if len(text) > length:
        text = re.sub(r" \([^()]*(?:\([^()]*\)[^()]*)*\)", "", text)
    if len(text) <= length:
        return text
    ends = dict.fromkeys(",; ", 0)
    depth = 0
    for place, character in enumerate(text[: length - 3]):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in ends:
            ends[character] = place
    return f"{text[: max(ends[','], ends[';']) or ends[' ']]} ..."


def checked_text(each: Description) -> str:
    """Return what the implementation was compared with, in words."""
    if each.is_control and each.checked == VerifiedBy.REFERENCE_IMPLEMENTATION:
        return "plain AdamW"
    return CHECKED_TEXT[VerifiedBy(each.checked)]


def format_form(form: ExportForm) -> str:
    """Return "yes" or "no" for a form of export, followed by its note: "no: vLLM does not load DoRA"."""
    answer = "yes" if form.possible else "no"
    return f"{answer}{', ' if form.possible else ': '}{form.note}" if form.note else answer


def format_count(count: int | None) -> str:
    """Return a number with commas, and - for None."""
    return "-" if count is None else f"{count:,}"


def format_value(value: float | int | str | bool) -> str:
    """Return the default of a hyperparameter as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _heading(axis: str, texts: dict[str, str]) -> str:
    return f"{axis.upper()}: {texts[axis]}" if axis in texts else axis.upper()


def _in_brackets(paper: str) -> str:
    return f" ({paper})" if paper else ""


def _row(cells: Sequence[str]) -> str:
    first, count, batching, merges, checked = cells
    return f"{first:18}{count:>13}  {batching:11}{merges:7}{checked}".rstrip()


def _wrap(text: str) -> list[str]:
    return _fill(f"    {text}", "      ")


def _fill(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
