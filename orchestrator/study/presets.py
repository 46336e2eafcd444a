"""Presets: the grids of the published study as defaults of a study's options.

A preset is the file `orchestrator/published/NAME.toml`. Every option that is typed beside --preset narrows or
replaces what the preset says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from orchestrator.study.options import OPTION_OF_HYPERPARAMETER, StudyOptions
from orchestrator.study.published_variants import PUBLISHED_FOLDER, PublishedVariant, read_variants
from orchestrator.study.rates import parse_learning_rates
from orchestrator.util.errors import UsageError, suggest_nearest

_PREFIX = "published-"


@dataclass(frozen=True)
class Preset:
    """A grid of the published study."""

    name: str
    title: str
    """Task, base model and data in words."""
    main_grid: bool
    """True for the four grids that have 2,980 runs together."""
    options: Mapping[str, Any]
    """Values of options by field of `StudyOptions` or of a script's own options; `set` has words of --set."""
    deviations: tuple[str, ...]
    """What is known to differ from the published study, or not known of it, one sentence each."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(self.options["task"])

    @property
    def runs_per_variant(self) -> int:
        """The runs that the protocol asks for of each variant."""
        rates = parse_learning_rates(self.options["learning_rates"])
        return len(self.tasks) * len(rates) * int(self.options["seeds"])

    @property
    def runs(self) -> int:
        """The runs that the protocol asks for, of all twenty variants."""
        return self.runs_per_variant * len(read_variants())


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(sorted(file.stem for file in PUBLISHED_FOLDER.glob(f"{_PREFIX}*.toml")))


@cache
def read_preset(name: str) -> Preset:
    """Return a preset.

    Args:
        name: Its name.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in preset_names():
        raise UsageError(f"--preset {name!r} is not one. {suggest_nearest(name, preset_names())}")
    data = tomllib.loads((PUBLISHED_FOLDER / f"{name}.toml").read_text())
    common = tomllib.loads((PUBLISHED_FOLDER / "common.toml").read_text())
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in data["options"].items()}
    deviations = (*data["deviations"], *common["deviations"])
    return Preset(name, data["title"], data["main_grid"], options, deviations)


def main_grid_runs() -> int:
    """Return the runs of the published main grids together."""
    return sum(preset.runs for preset in map(read_preset, preset_names()) if preset.main_grid)


def split_variants(existing: Collection[str]) -> tuple[list[PublishedVariant], list[PublishedVariant]]:
    """Return the published variants that exist here, and those that do not.

    Args:
        existing: Names of this project's variants.
    """
    variants = read_variants()
    return [v for v in variants if v.name in existing], [v for v in variants if v.name not in existing]


def preset_defaults(
    name: str, options_class: type[StudyOptions], existing: Collection[str]
) -> dict[str, Any]:
    """Return the defaults that a preset gives to options, without `set`.

    Args:
        name: The name of the preset.
        options_class: The options of the script; a preset's option that it does not have is left out.
        existing: Names of this project's variants.

    Raises:
        UsageError: There is no such preset.
    """
    own = {each.name for each in fields(options_class)}
    if "replicates" in own:
        own.discard("seeds")  # each replicate has a seed of its own
    defaults = {key: value for key, value in read_preset(name).options.items() if key in own and key != "set"}
    return {**defaults, "preset": name, "variants": tuple(v.name for v in split_variants(existing)[0])}


def complete_options(
    values: Mapping[str, Any], options_class: type[StudyOptions], existing: Collection[str]
) -> dict[str, Any]:
    """Return parsed options, with the words that a preset adds to --set.

    A word of --set or --space replaces the preset's word or option for the same hyperparameter, and --steps
    replaces its epochs.

    Args:
        values: The value of every option; where none was typed, that of `preset_defaults`.
        options_class: The options of the script.
        existing: Names of this project's variants.

    Raises:
        UsageError: There is no such preset.
    """
    name = values.get("preset")
    if name is None:
        return dict(values)
    completed = dict(values)
    defaults = preset_defaults(name, options_class, existing)
    typed = [_key(word) for word in (*completed["set"], *(completed.get("space") or ()))]
    replaced = {option for key in typed if (option := OPTION_OF_HYPERPARAMETER.get(key))}
    if "steps" in typed or completed["steps"] != defaults.get("steps"):
        replaced.add("epochs")
    if completed["epochs"] != defaults.get("epochs"):
        replaced.add("steps")
    plain = {each.name: each.default for each in fields(options_class) if each.default is not MISSING}
    for option in replaced:
        if option in defaults and completed[option] == defaults[option]:
            completed[option] = plain[option]
    words = published_words(name, completed["variants"] or ())
    words = [word for word in words if _key(word) not in typed]
    completed["set"] = (*words, *completed["set"])
    return completed


def published_words(name: str, variants: Sequence[str]) -> list[str]:
    """Return the settings of a preset as NAME=VALUE words, in the form that --set takes.

    Args:
        name: The name of the preset.
        variants: Names of the study's variants; settings of other variants are left out.
    """
    variants = [variant.replace("-", "_") for variant in variants]
    settings = [f"{v.name}.{word}" for v in read_variants() if v.name in variants for word in v.set]
    own = [
        word
        for word in read_preset(name).options["set"]
        if "." not in _key(word) or _key(word).partition(".")[0] in variants
    ]
    return list({_key(word): word for word in (*settings, *own)}.values())


def _key(word: str) -> str:
    """Return NAME or VARIANT.NAME of a word of --set or --space."""
    return word.partition("=")[0].replace("-", "_")
