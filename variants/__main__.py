"""The catalogue of variants: what each one computes, and what it was checked against.

python -m variants                  # all entries by axis
python -m variants lora_plus        # one entry: equation, hyperparameters, an example
python -m variants peft:LOHA        # a tuner of the PEFT library; likewise ./my_variant.py, a file of yours
python -m variants --taxonomy       # the survey's methods, with the reason where one has no entry
python -m variants --json           # all entries for programs (also with a name or --taxonomy)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from variants.describe import (
    AXES,
    LAYERS,
    RANK,
    SIDE,
    Description,
    checked_text,
    describe,
    describe_all,
    form_text,
    paper_link,
    read_methods,
    value_text,
)
from variants.variant_settings import FILE_SUFFIX, canonical_name

EXIT_USAGE = 2
"""Exit code for a name that does not exist, and for options that exclude each other."""
WIDTH = 80
STARTS = {
    "base": "W' = W at step 0, bit for bit",
    "rounded": "W' = W at step 0, up to rounding",
    "other": "W' differs from W at step 0",
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
    if name:
        entry = describe(name if name.endswith(FILE_SUFFIX) else canonical_name(name))
        return json.dumps(entry, indent=1) if as_json else format_entry(entry)
    found = read_methods() if taxonomy else describe_all()
    if as_json:
        return json.dumps(found, indent=1)
    return format_taxonomy(found) if taxonomy else format_catalogue(found)


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
    return "\n".join([*lines, "", "Example:", f"  {_example_command(each)}"])


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


def _example_command(each: Description) -> str:
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
