"""Presets: the grids of the published study (arXiv 2601.22708) as defaults of the options of a study.

A preset is the file `orchestrator/published/NAME.toml`. Options on the command line have precedence over the
preset.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.study.grids import parse_learning_rates
from orchestrator.study.options import OPTION_OF_HYPERPARAMETER, StudyOptions, setting_key
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_names import canonical_name

PUBLISHED_FOLDER = Path(__file__).parents[1] / "published"
"""Folder of the published scores, `variants.toml` and the presets."""


@dataclass(frozen=True)
class PublishedVariant:
    """One of the twenty variants of the published study."""

    title: str
    """The published name, for example LoRA+."""
    name: str
    """The name in this project, for example lora_plus. The variant may not exist in this project yet."""
    set: tuple[str, ...]
    """The published settings as NAME=VALUE words, without the name of the variant; may be empty."""
    published: str
    """The published settings in the paper's words."""
    differs: tuple[str, ...]
    """Differences of this project's variant from the published one, one sentence each."""


@cache
def read_variants() -> tuple[PublishedVariant, ...]:
    """Return the variants of the published study."""
    data = tomllib.loads((PUBLISHED_FOLDER / "variants.toml").read_text())
    return tuple(
        PublishedVariant(
            title,
            own["name"],
            tuple(own.get("set", ())),
            own["published"],
            tuple(own.get("differs", ())),
        )
        for title, own in data.items()
    )


_PREFIX = "published-"


@dataclass(frozen=True)
class Preset:
    """A grid of the published study."""

    name: str
    title: str
    """Task, base model and data, for readers."""
    main_grid: bool
    """True for the four main grids of the published study, which have 2,980 runs together."""
    options: Mapping[str, Any]
    """Field of `StudyOptions`, or of a script's options -> value. `set` has NAME=VALUE words, as --set."""
    deviations: tuple[str, ...]
    """Differences from the published study, and settings that it does not report; one sentence each."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.options["task"])

    @property
    def runs_per_variant(self) -> int:
        """Number of runs of each variant in the published protocol: tasks x rates x seeds."""
        rates = parse_learning_rates(self.options["learning_rates"])
        return len(self.tasks) * len(rates) * int(self.options["seeds"])

    @property
    def runs(self) -> int:
        """Number of runs of all twenty variants in the published protocol."""
        return self.runs_per_variant * len(read_variants())


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(sorted(file.stem for file in PUBLISHED_FOLDER.glob(f"{_PREFIX}*.toml")))


@cache
def read_preset(name: str) -> Preset:
    """Return the preset `name`.

    Raises:
        UsageError: There is no preset of this name.
    """
    if name not in preset_names():
        raise UsageError(f"--preset {name!r}: no such preset. {suggest_nearest(name, preset_names())}")
    data = tomllib.loads((PUBLISHED_FOLDER / f"{name}.toml").read_text())
    common = tomllib.loads((PUBLISHED_FOLDER / "common.toml").read_text())
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in data["options"].items()}
    deviations = (*data["deviations"], *common["deviations"])
    return Preset(name, data["title"], data["main_grid"], options, deviations)


def main_grid_runs() -> int:
    """Return the number of runs of all main grids of the published study."""
    return sum(preset.runs for preset in map(read_preset, preset_names()) if preset.main_grid)


def split_variants(existing: Collection[str]) -> tuple[list[PublishedVariant], list[PublishedVariant]]:
    """Return the published variants that exist in this project, and those that do not.

    Args:
        existing: Names of this project's variants.
    """
    variants = read_variants()
    return [v for v in variants if v.name in existing], [v for v in variants if v.name not in existing]


def preset_defaults(
    name: str, options_class: type[StudyOptions], existing: Collection[str]
) -> dict[str, Any]:
    """Return the defaults that a preset gives to options: field -> value, without `set`.

    Args:
        name: Name of the preset.
        options_class: Class of the script's options. Options of the preset that it lacks are left out.
        existing: Names of this project's variants.

    Raises:
        UsageError: There is no preset of this name.
    """
    own = {each.name for each in fields(options_class)}
    if "replicates" in own:
        own.discard("seeds")  # Each replicate has its own seed.
    defaults = {key: value for key, value in read_preset(name).options.items() if key in own and key != "set"}
    return {**defaults, "preset": name, "variants": tuple(v.name for v in split_variants(existing)[0])}


def complete_options(
    values: Mapping[str, Any], options_class: type[StudyOptions], existing: Collection[str]
) -> dict[str, Any]:
    """Add the --set words of a preset to parsed options, and remove what the command line replaces.

    A word of --set or --space replaces the preset's word or option for the same hyperparameter; --steps
    replaces its --epochs, and --epochs its --steps.

    Args:
        values: Option -> value; the value is that of `preset_defaults` if the option was not given.
        options_class: Class of the script's options.
        existing: Names of this project's variants.

    Returns:
        Option -> value; a copy of `values` if no preset is chosen.

    Raises:
        UsageError: There is no preset of this name.
    """
    name = values.get("preset")
    if name is None:
        return dict(values)
    completed = dict(values)
    defaults = preset_defaults(name, options_class, existing)
    typed = [setting_key(word) for word in (*completed["set"], *(completed.get("space") or ()))]
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
    words = [word for word in words if setting_key(word) not in typed]
    completed["set"] = (*words, *completed["set"])
    return completed


def published_words(name: str, variants: Sequence[str]) -> list[str]:
    """Return the settings of a preset as NAME=VALUE words of --set.

    Args:
        name: Name of the preset.
        variants: Names of the study's variants. Settings of other variants are left out.

    Returns:
        One word per hyperparameter. A setting of the preset replaces one of the published variant.
    """
    variants = [canonical_name(variant) for variant in variants]
    settings = [f"{v.name}.{word}" for v in read_variants() if v.name in variants for word in v.set]
    own = [
        word
        for word in read_preset(name).options["set"]
        if "." not in setting_key(word) or setting_key(word).rpartition(".")[0] in variants
    ]
    return list({setting_key(word): word for word in (*settings, *own)}.values())
