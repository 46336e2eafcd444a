"""Check the names and values that a user has typed, without loading a model or data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.sources import hub_data, user_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import data_loading
from orchestrator.finetune.tasks.base import Task
from orchestrator.study import grids, space
from orchestrator.study.configuration import Value
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Space
from orchestrator.util.errors import UsageError, suggest_nearest
from variants import catalogue
from variants.variant_settings import FILE_SUFFIX, PEFT_PREFIX, AdaptationScope, canonical_name

MAX_TRIED_RANK = 64
"""The largest rank with which `_try_variant` tries a variant. It keeps the layer small, whose sides are at
least twice the rank."""


@dataclass(frozen=True)
class ResolvedOptions:
    """The objects and values that a study's options name, checked, for one of its tasks."""

    variants: tuple[str, ...]
    task: Task
    model: str
    learning_rates: tuple[float, ...]
    fixed: Mapping[str, Value] = field(default_factory=dict)
    """The values of --set, by setting."""
    space: Space | None = None
    """The search space; None for a grid."""


def resolve_tasks(options: StudyOptions, bases: Path, add_pins: bool = True) -> list[ResolvedOptions]:
    """Resolve the options of a study for each of its tasks.

    Args:
        options: The options of a study, with its variants, and its tasks or data.
        bases: The store's folder of base models.
        add_pins: Whether the commits of hub datasets that are used for the first time are stored there.

    Returns:
        The result of `resolve_options` for each distinct task, in the order of the options.

    Raises:
        UsageError: A name or a value is wrong (see `resolve_options`), data are not as required, or two
            tasks have the same name.
    """
    hub_data.set_pin_folder(bases, add_pins)  # before data are read
    names = dict.fromkeys(load_data_tasks(options) or options.task or ())
    resolved = [resolve_options(options, name, bases) for name in names]
    for name in resolved[0].variants:
        _try_variant(name, options)
    by_name: dict[str, Task] = {}
    for task in (each.task for each in resolved):
        other = by_name.setdefault(task.name, task)
        if other.source != task.source:  # equal code may read other data in another folder
            raise _same_name_error("--task", other.source, task.source)
    return list({each.task.name: each for each in resolved}.values())


def load_data_tasks(options: StudyOptions) -> list[str]:
    """Read each source of --data, register its task in the catalogue, and return the names of the tasks.

    Raises:
        UsageError: The data are not as required, or two sources have the same name.
    """
    sources: dict[str, str] = {}
    other_tasks = (*tasks.names(), *tasks.entry_points_by_name())
    for source in options.data or ():
        name = user_data.display_name(source)
        # A folder or a dataset of the hub may be called like another task, or like a task file.
        if name in other_tasks or name.endswith(FILE_SUFFIX):
            name += "-data"
        if name not in sources:
            sources[name] = source
            tasks.register(data_loading.load_task(source, options, name))
        elif os.path.abspath(sources[name]) != os.path.abspath(source):
            raise _same_name_error("--data", sources[name], source)
    return list(sources)


def _same_name_error(option: str, one: str, other: str) -> UsageError:
    return UsageError(f"{option}: {one!r} and {other!r} have the same name; rename one of them.")


def resolve_options(options: StudyOptions, task_name: str, bases: Path) -> ResolvedOptions:
    """Look up the variants, model, learning rates and search space of a study on one task.

    A grid without --set needs neither torch nor transformers, so that a wrong name is answered at once.

    Args:
        options: The options of the command line.
        task_name: The name of the task, or the path of the file that defines it.
        bases: The store's folder of base models.

    Raises:
        UsageError: A variant, task, metric or model is unknown, an option for a head is given for a task
            without a head, or the learning rates, the values of --set or the search space are invalid.
    """
    variants, task = load_variants(options.variants or ()), tasks.load(task_name)
    if task.has_head:
        metrics.check_metric(task)
    elif options.head_learning_rate != "same":
        raise UsageError(
            f"--head-learning-rate {options.head_learning_rate}: task {task.name!r} has no head; take same."
        )
    options = fill_accumulation(options, task)
    model = options.model or getattr(task, "default_model", None)
    if model is None:  # the task of a user's file
        raise UsageError(
            f"Task {task.name!r} has no default_model; add one to the task, or choose a --model."
        )
    model_catalogue.find_content(model, bases)  # raises UsageError for an unknown model
    typed_rates = options.learning_rates
    learning_rates = grids.parse_learning_rates(typed_rates) if typed_rates else task.defaults.learning_rates
    grids.check_grid_size(options.seed_count, len(learning_rates))
    fixed, search_space = _parse_fixed_and_space(options, variants, task, learning_rates)
    return ResolvedOptions(variants, task, model, learning_rates, fixed, search_space)


def load_variants(typed_names: Sequence[str]) -> tuple[str, ...]:
    """Import the variants that a user has named.

    Args:
        typed_names: Names in any spelling, and paths of Python files.

    Returns:
        The names as configurations have them, each of them once.

    Raises:
        UsageError: There is no such variant, one from outside this project cannot be imported, or two files
            have the same name or the same content.
    """
    typed_by_name: dict[str, str] = {}
    for typed in typed_names:
        name = canonical_name(typed)
        other = typed_by_name.setdefault(name, typed)
        if name.endswith(FILE_SUFFIX) and os.path.realpath(other) != os.path.realpath(typed):
            raise _same_name_error("--variants", other, typed)
    by_revision: dict[str, str] = {}
    for name, typed in typed_by_name.items():
        if not catalogue.is_known(name):
            raise UsageError(
                f"--variants: no variant {name!r}. {suggest_nearest(name, catalogue.names())} peft:TYPE and "
                "the path to a .py file with a variant work, too."
            )
        if name not in catalogue.built_in_names():
            try:
                variant = catalogue.load(typed) if name.endswith(FILE_SUFFIX) else catalogue.get(name)
            except ValueError as error:
                raise UsageError(f"--variants: {error}") from error
            other = by_revision.setdefault(variant.revision, name)
            if name.endswith(FILE_SUFFIX) and other != name:
                raise UsageError(f"--variants: {other!r} and {name!r} have the same content; leave one out.")
    return tuple(typed_by_name)


def _try_variant(name: str, options: StudyOptions) -> None:
    """Let a variant from outside this project train a small layer for one step.

    An error is then found before a base model is made and trainers are started.
    """
    if name in catalogue.built_in_names() or name.startswith(PEFT_PREFIX):
        return
    from variants.api import VariantSettings
    from variants.testing.rig import find_fault

    variant = catalogue.get(name)
    settings = VariantSettings(
        min(options.rank, MAX_TRIED_RANK) if variant.uses_rank else 0,
        options.alpha if variant.uses_alpha else None,
        options.dropout if variant.uses_dropout else 0.0,
        dict(variant.extra_defaults),
    )
    try:
        settings = variant.validate_settings(settings)
    except ValueError:
        return  # `find_settings_error` reports it, with the values of --set
    if fault := find_fault(variant, settings):
        raise UsageError(
            f"--variants: {variant.source_path or name!r} fails in its first step on a small layer: {fault}; "
            "correct it there (variants.testing.check_laws tests what a variant must satisfy)."
        )


def fill_accumulation(options: StudyOptions, task: Task) -> StudyOptions:
    """Fill in `accumulation` if missing: the largest divisor of the batch size up to the task's default."""
    if options.accumulation is not None:
        return options
    size, max_accumulation = options.batch_size or task.defaults.batch_size, task.defaults.accumulation
    return replace(options, accumulation=max(n for n in range(1, max_accumulation + 1) if size % n == 0))


def variant_hyperparameters(name: str) -> Mapping[str, Value]:
    """Return the hyperparameters of a variant by name, with their default values.

    The defaults of rank, alpha, dropout and targets are options of the command line; their value here is the
    placeholder 0.
    """
    variant = catalogue.traits(name)
    own: dict[str, Value] = {}
    if variant["adaptation_scope"] == AdaptationScope.TARGET_LAYERS:
        used = (each for each in ("rank", "alpha", "dropout") if variant[f"uses_{each}"])
        own = dict.fromkeys((*used, "targets"), 0)
    return own | dict(variant["extra_defaults"])


def _parse_fixed_and_space(
    options: StudyOptions, variants: Sequence[str], task: Task, learning_rates: Sequence[float]
) -> tuple[Mapping[str, Value], Space | None]:
    own = {name: variant_hyperparameters(name) for name in variants}
    fixed = space.parse_fixed_values(options.set, own)
    is_search = options.search != "grid"
    for key in fixed:
        name = key.rpartition(".")[2]
        if name == "learning_rate" and not is_search:
            raise UsageError(f"--set {key}: a grid's rates are those of --learning-rates.")
        _check_has_head(f"--set {key}", name, task)
    if not is_search:
        return fixed, None
    if len(learning_rates) == 1:
        fixed.setdefault("learning_rate", learning_rates[0])
    search_space = space.parse_space(options.space or (), own, learning_rates, tuple(fixed))
    _check_space(options, search_space, task)
    return fixed, search_space


def _check_space(options: StudyOptions, search_space: Space, task: Task) -> None:
    train_size = options.train_size or task.defaults.train_size
    dimensions = {d.key: d for each in search_space.values() for d in each}
    for dimension in dimensions.values():
        _check_has_head(f"--space {dimension.key}", dimension.name, task)
        if dimension.name == "batch_size":
            if not dimension.choices and (options.accumulation or 1) > 1:
                raise UsageError(
                    f"--space {dimension.key}: with --accumulation {options.accumulation} take a choice of "
                    "batch sizes that it divides."
                )
            for value in dimension.choices_or_ends:
                options.check_batch_size(int(value))
                if int(value) > train_size:
                    raise UsageError(
                        f"--space {dimension.key}: {value}: must be {train_size} or less, the number of "
                        "training examples."
                    )
    if options.search_method == "cma-es":
        for variant, own in search_space.items():
            if not any(d.is_numeric for d in own):
                raise UsageError(f"--sampler cma-es: {variant} has nothing numeric to search; take tpe.")
    if not dimensions:
        raise UsageError(
            f"--search {options.search}: nothing varies, neither the learning rate nor anything in --space; "
            "take a --space, rank=4,8 say, or --search grid."
        )


def _check_has_head(option: str, name: str, task: Task) -> None:
    if name == "head_learning_rate" and not task.has_head:
        raise UsageError(f"{option}: task {task.name!r} has no head; leave it out.")
