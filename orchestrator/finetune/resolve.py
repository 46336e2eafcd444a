"""From names to configurations: defaults filled in, the base's content known, every value checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.finetune import models
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study import rates
from orchestrator.study.configuration import (
    Batches,
    Configuration,
    ModelChoice,
    Optimizer,
    Schedule,
    VariantChoice,
)
from orchestrator.study.errors import BadInput, nearest
from orchestrator.study.options import StudyOptions
from variants import catalogue

UNPREPARED = "not prepared yet"
"""The content of a base that has yet to be made, in a plan: it meets no record."""


@dataclass(frozen=True)
class Names:
    """What the options name, checked, before anything is loaded."""

    variants: tuple[str, ...]
    task: Task
    model: str
    learning_rates: tuple[float, ...]


def names(options: StudyOptions, default_task: str, default_variants: Sequence[str], bases: Path) -> Names:
    """Raises BadInput for an unknown variant, task or model. Imports neither torch nor transformers."""
    variants = tuple(dict.fromkeys(options.variants or default_variants))
    for name in variants:
        if name not in catalogue.names():
            raise BadInput(f"--variants: no variant {name!r}. {nearest(name, catalogue.names())}")
    task = tasks.get(options.task or default_task)
    model = options.model or task.default_model
    models.resolve(model, bases)  # raises BadInput for a name that is none
    grid = rates.parse(options.learning_rates) if options.learning_rates else task.defaults.learning_rates
    return Names(variants, task, model, grid)


def base(model: str, bases: Path, progress: Callable[[str], None] | None) -> str:
    """The content of the base model; made or found first, unless `progress` is None (a plan)."""
    if progress is None:
        return models.resolve(model, bases) or UNPREPARED
    return models.prepare(model, bases, progress)


def templates(options: StudyOptions, chosen: Names, content: str, bases: Path) -> list[Configuration]:
    """One configuration a variant, complete but for learning rate and seed. Raises BadInput for a rank or
    target that the model cannot have (as far as the model is there to be asked)."""
    task, defaults = chosen.task, chosen.task.defaults
    model = ModelChoice(chosen.model, content, options.dtype or defaults.dtype)
    made = []
    for name in chosen.variants:
        variant = catalogue.get(name)
        choice = VariantChoice(
            name,
            rank=options.rank,
            alpha=options.alpha if variant.uses_alpha else None,
            targets=options.targets,
            extra=dict(variant.extra),
            numerics=variant.numerics,
        )
        made.append(
            Configuration(
                variant=choice,
                task=task.choice(),
                model=model,
                optimizer=Optimizer(learning_rate=1.0),  # replaced by the grid's
                schedule=Schedule(options.steps or defaults.steps, options.schedule, defaults.warmup),
                batches=Batches(options.batch_size or defaults.batch_size, 1, defaults.max_length),
                evaluations=min(defaults.evaluations, options.steps or defaults.steps),
            )
        )
    if content != UNPREPARED:
        _check_fit(made, bases)
    return made


def _check_fit(configurations: Sequence[Configuration], bases: Path) -> None:
    """Attaches each variant to the model's shapes (no weights): what would fail on a GPU fails here."""
    from variants.attach import attach
    from variants.contract import Settings

    for configuration in configurations:
        variant = configuration.variant
        settings = Settings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        try:
            skeleton = models.skeleton(configuration.model, bases)
            attach(skeleton, catalogue.get(variant.name), settings, variant.targets)
        except ValueError as error:
            raise BadInput(f"{configuration.model.name} with {variant.name}: {error}") from None
