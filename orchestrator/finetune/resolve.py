"""From names to configurations: defaults filled in, the base's content known, every value checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.finetune import metrics, models
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
    """Raises BadInput for an unknown variant, task or model, and for a head's rate without a head. Imports
    neither torch nor transformers."""
    typed = (name.replace("-", "_") for name in options.variants or default_variants)
    variants = tuple(dict.fromkeys(typed))
    for name in variants:
        if name not in catalogue.names():
            raise BadInput(f"--variants: no variant {name!r}. {nearest(name, catalogue.names())}")
    task = tasks.get(options.task or default_task)
    if task.has_head:
        metrics.of(task)  # raises BadInput for one that is none
    elif options.head_learning_rate != "same":
        raise BadInput(
            f"--head-learning-rate {options.head_learning_rate}: task {task.name!r} has no head; take same."
        )
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
    target that the model cannot have, and for a variant that does not suit the task (as far as the model is
    there to be asked)."""
    task, defaults = chosen.task, chosen.task.defaults
    model = ModelChoice(chosen.model, content, options.dtype or defaults.dtype)
    batch_size, parts = options.batch_size or defaults.batch_size, options.accumulation
    options.check_batch(batch_size)
    head_rate = None if options.head_learning_rate == "same" else float(options.head_learning_rate)
    made = [
        Configuration(
            variant=_variant(name, options),
            task=task.choice(),
            model=model,
            # The learning rate is replaced by the grid's.
            optimizer=Optimizer(learning_rate=1.0, head_learning_rate=head_rate),
            schedule=Schedule(options.steps or defaults.steps, options.schedule, defaults.warmup),
            batches=Batches(batch_size // parts, parts, defaults.max_length),
            evaluations=min(defaults.evaluations, options.steps or defaults.steps),
        )
        for name in chosen.variants
    ]
    if content != UNPREPARED:
        _check_fit(made, task, bases)
    return made


def _variant(name: str, options: StudyOptions) -> VariantChoice:
    """What a variant does not have is alike whatever was typed, so that it is no other configuration."""
    variant = catalogue.get(name)
    return VariantChoice(
        name,
        rank=options.rank if variant.uses_rank else 0,
        alpha=options.alpha if variant.uses_alpha else None,
        dropout=options.dropout if variant.uses_dropout and variant.adapts == "layers" else 0.0,
        targets=options.targets if variant.adapts == "layers" else "blocks",
        extra=dict(variant.extra),
        numerics=variant.numerics,
    )


def _check_fit(configurations: Sequence[Configuration], task: Task, bases: Path) -> None:
    """Attaches each variant to the model's shapes (no weights): what would fail on a GPU fails here."""
    from variants.attach import attach
    from variants.contract import Settings

    for configuration in configurations:
        variant = configuration.variant
        settings = Settings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        try:
            model, heads = models.skeleton(configuration.model, bases, task)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads)
        except ValueError as error:
            raise BadInput(f"{configuration.model.name} with {variant.name}: {error}") from None
