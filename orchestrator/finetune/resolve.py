"""From names to configurations: defaults filled in, the base's content known, every value checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.models import loading, model_checks
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import HELD_OUT, Example, Split, Task
from orchestrator.study import bounds, rates, space
from orchestrator.study.configuration import (
    Batches,
    Configuration,
    ModelChoice,
    Optimizer,
    Schedule,
    VariantChoice,
)
from orchestrator.study.lr_schedule import warmup_steps
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Space, Value, applied
from orchestrator.util import user_code
from orchestrator.util.atomic_files import naming
from orchestrator.util.errors import BadInput, nearest
from variants import catalogue


@dataclass(frozen=True)
class Names:
    """What the options name, checked, before anything is loaded."""

    variants: tuple[str, ...]
    task: Task
    model: str
    learning_rates: tuple[float, ...]
    fixed: Mapping[str, Value] = field(default_factory=dict)
    """What --set says."""
    space: Space | None = None
    """Of a search."""


def names(options: StudyOptions, default_task: str, default_variants: Sequence[str], bases: Path) -> Names:
    """Raises BadInput for an unknown variant, task or model, for a head's rate without a head, and for a
    search space that cannot be. Imports neither torch nor transformers but for a search and for --set."""
    hub_data.keep_pins_in(bases)
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
    options = split_as(options, task)
    model = options.model or default_model(task)
    loading.resolve(model, bases)  # raises BadInput for a name that is none
    grid = rates.parse(options.learning_rates) if options.learning_rates else task.defaults.learning_rates
    bounds.check_grid(options.seed_count, len(grid))
    fixed, searched = _searched(options, variants, task, grid)
    return Names(variants, task, model, grid, fixed, searched)


def default_model(task: Task) -> str:
    """Return the name of the task's own base model. Raises BadInput for a user's task that names none."""
    if not hasattr(task, "default_model"):
        raise BadInput(f"Task {task.name!r} has no default_model; add one to the task, or choose a --model.")
    return task.default_model


def split_as(options: StudyOptions, task: Task) -> StudyOptions:
    """With the task's own parts of a batch where none were typed, or fewer where the batch does not divide by
    them."""
    if options.accumulation is not None:
        return options
    size, most = options.batch_size or task.defaults.batch_size, task.defaults.accumulation
    return replace(options, accumulation=max(n for n in range(1, most + 1) if size % n == 0))


def base(model: str, bases: Path, progress: Callable[[str], None] | None) -> str:
    """The content of the base model; made or found first, unless `progress` is None (a plan)."""
    if progress is None:
        return loading.resolve(model, bases) or UNPREPARED
    return loading.prepare(model, bases, progress)


def templates(options: StudyOptions, chosen: Names, content: str, bases: Path) -> list[Configuration]:
    """One configuration a variant, complete but for learning rate and seed (of a search: for what it varies).
    Raises BadInput for a rank or target that the model cannot have, for a variant that does not suit the task
    (as far as the model is there to be asked), and for a space with such values at its ends."""
    task, defaults = chosen.task, chosen.task.defaults
    options = split_as(options, task)
    model = ModelChoice(chosen.model, content, options.dtype or defaults.dtype)
    batch_size, parts = options.batch_size or defaults.batch_size, options.accumulation or 1
    options.check_batch(batch_size)
    head_rate = None if options.head_learning_rate == "same" else float(options.head_learning_rate)
    with user_code.told(task.name, "gives no examples"):
        choice = task.choice()  # reads all of the data
    made = [
        Configuration(
            variant=_variant(name, options),
            task=choice,
            model=model,
            # The learning rate is replaced by the grid's.
            optimizer=Optimizer(
                learning_rate=1.0, weight_decay=defaults.weight_decay, head_learning_rate=head_rate
            ),
            schedule=Schedule(
                options.steps or defaults.steps, options.schedule or defaults.schedule, defaults.warmup
            ),
            batches=Batches(batch_size // parts, parts, defaults.max_length),
            base_dropout=options.base_dropout or defaults.base_dropout,
            evaluations=min(options.evaluations or defaults.evaluations, options.steps or defaults.steps),
        )
        for name in chosen.variants
    ]
    made = [applied(each, _had(each.variant.name, chosen.fixed)) for each in made]
    for configuration in made:
        if any(key.endswith("batch_size") for key in chosen.fixed):
            options.check_batch(configuration.batches.batch_size * configuration.batches.accumulation)
    tried = made if chosen.space is None else [c for each in made for c in corners(each, chosen.space)]
    for configuration in tried:
        if (refused := refusal(configuration)) is not None:
            raise BadInput(refused)
        if configuration.schedule.steps == warmup_steps(configuration.schedule) == 1:
            raise BadInput(
                "--steps 1: the only step would be warm-up, at learning rate 0, and nothing would be learnt; "
                "take more steps, or --set warmup=0."
            )
    if has_shapes(model):
        _check_fit(_unlike(tried), task, bases)
    return made


def has_shapes(model: ModelChoice) -> bool:
    """Return whether rank and targets can be checked against the model's layers."""
    return model.content != UNPREPARED or loading.unmade(model) is not None


def data(
    configurations: Sequence[Configuration], bases: Path, folder: Path, progress: Callable[[str], None]
) -> None:
    """Examples and token ids for all of them, in `folder`, made where they are lacking: before a GPU is asked
    for. Raises BadInput when examples cannot be had or tokenised, and OSError when there is no space."""
    from orchestrator.finetune.data import dataset_cache
    from orchestrator.finetune.data.batches import longest

    alike = {(c.task, c.model, c.batches.max_length): c for c in configurations}
    for configuration in alike.values():
        task = tasks.get(configuration.task.name)
        processor = loading.processor_of(configuration.model, bases, task)
        with naming(folder):
            found = dataset_cache.prepare(folder, configuration, task, processor, progress)
        if task.inputs != "image":
            _check_ids(configuration, bases, dataset_cache.largest_id(found))
            most = dataset_cache.longest_row(found, task)
            if most > longest(task, configuration.batches.max_length):  # else `_check_fit` has compared it
                model, _ = loading.skeleton(configuration.model, bases, task)
                try:
                    _check_positions(model, most, task)
                except ValueError as error:
                    raise BadInput(f"Model {configuration.model.name!r}: {error}") from None
            tell_shared(task, found.examples, progress)


def tell_shared(
    task: Task, examples: Mapping[Split, Sequence[Example]], progress: Callable[[str], None]
) -> None:
    """Say how many examples of a user's task are scored and trained on: their scores show what was learnt by
    heart. Data may have a few by themselves, so they are not refused.

    Args:
        task: The task. The project's own have splits that are known.
        examples: Its texts.
        progress: What takes the line.
    """
    if not task.name.endswith(".py"):
        return
    train = {(example.prompt, example.pair, example.answer) for example in examples["train"]}
    for split in HELD_OUT:
        shared = sum((each.prompt, each.pair, each.answer) in train for each in examples[split])
        if shared:
            progress(
                f"{Path(task.name).stem}: {shared} of {len(examples[split])} {split} examples are train "
                "examples as well; their scores show what was learnt by heart"
            )


def _check_ids(configuration: Configuration, bases: Path, largest: int) -> None:
    """Raise BadInput where an example has a token for which the model has no embedding."""
    model = configuration.model
    count = loading.embeddings(model, bases)
    if count is not None and largest >= count:
        raise BadInput(
            f"Model {model.name!r}: its tokenizer gives token {largest} for an example of task "
            f"{configuration.task.name!r}, and the model has embeddings for {count} tokens, from 0 on; take "
            "the tokenizer that belongs to the model."
        )


def _had(variant: str, fixed: Mapping[str, Value]) -> dict[str, Value]:
    """Without what the variant does not have, so that it is no other configuration."""
    own = _own(variant) if fixed else {}
    return {key: v for key, v in fixed.items() if key not in space.OF_VARIANTS or key in own}


def corners(configuration: Configuration, searched: Space) -> list[Configuration]:
    """`configuration` at the ends (and words) of what its variant is made of, in all combinations, and at
    each of its choices."""
    dimensions = [
        d for d in searched.variants[configuration.variant.name] if d.variant or d.name in space.OF_VARIANTS
    ]
    ends = [(d.ends[0], d.ends[-1]) if d.numeric else d.ends for d in dimensions]
    found = [
        applied(configuration, dict(zip((d.key for d in dimensions), values, strict=True)))
        for values in product(*ends)
    ]
    return found + [applied(found[0], {d.key: value}) for d in dimensions for value in d.ends[1:-1]]


def _unlike(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Those whose adapters differ in shape: a model's skeleton takes a second or two each."""
    found = {(c.variant.name, c.variant.rank, str(c.variant.extra)): c for c in configurations}
    return list(found.values())


def refusal(configuration: Configuration) -> str | None:
    """Why the variant cannot have its settings, in one line, whatever the model; None when it can."""
    from variants.base import Settings

    variant = configuration.variant
    try:
        catalogue.get(variant.name).checked_settings(
            Settings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        )
    except ValueError as error:
        return f"{variant.name}: {error}"
    return None


def _searched(
    options: StudyOptions, variants: Sequence[str], task: Task, grid: Sequence[float]
) -> tuple[Mapping[str, Value], Space | None]:
    fixed = space.settings(options.set, variants, _own)
    search = options.search != "grid"
    for key in fixed:
        name = key.rpartition(".")[2]
        if name == "learning_rate" and not search:
            raise BadInput(f"--set {key}: a grid's rates are those of --learning-rates.")
        _check_head(f"--set {key}", name, task)
    if not search:
        return fixed, None
    if len(grid) == 1:
        fixed.setdefault("learning_rate", grid[0])
    words = options.space or ()
    searched = space.parse(words, variants, _own, grid, tuple(fixed))
    for dimension in searched.dimensions:
        _check_head(f"--space {dimension.key}", dimension.name, task)
        if dimension.name == "batch_size":
            if not dimension.choices and (options.accumulation or 1) > 1:
                raise BadInput(
                    f"--space {dimension.key}: with --accumulation {options.accumulation} take a choice of "
                    "batch sizes that it divides."
                )
            for value in dimension.ends:
                options.check_batch(int(value))
    if options.method == "cma-es":
        for variant, dimensions in searched.variants.items():
            if not any(d.numeric for d in dimensions):
                raise BadInput(f"--sampler cma-es: {variant} has nothing numeric to search; take tpe.")
    if not searched.dimensions:
        raise BadInput(
            f"--search {options.search}: nothing varies, neither the learning rate nor anything in --space; "
            "take a --space, rank=4,8 say, or --search grid."
        )
    return fixed, searched


def _check_head(where: str, name: str, task: Task) -> None:
    if name == "head_learning_rate" and not task.has_head:
        raise BadInput(f"{where}: task {task.name!r} has no head; leave it out.")


def _own(name: str) -> Mapping[str, Value]:
    """The settings of a variant's own."""
    variant = catalogue.get(name)
    usual = {"rank": variant.uses_rank, "alpha": variant.uses_alpha, "dropout": variant.uses_dropout}
    own: dict[str, Value] = {k: 0 for k, used in usual.items() if used and variant.adapts == "layers"}
    return own | dict(variant.extra)


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


def _check_positions(model: Any, most: int, task: Task) -> None:
    """Raise ValueError where `most` tokens of a text, or of a prompt and what is generated to it, are more
    than the model has positions for."""
    room = model_checks.positions(model)
    if room is not None and most > room:
        raise ValueError(
            f"it has positions for {room} tokens, and task {task.name!r} needs up to {most}; take another "
            "--model, or shorter texts"
        )


def _check_fit(configurations: Sequence[Configuration], task: Task, bases: Path) -> None:
    """Attaches each variant to the model's shapes (no weights): what would fail on a GPU fails here."""
    from orchestrator.finetune.data.batches import longest
    from orchestrator.finetune.models import own_dropout
    from variants.attach import attach
    from variants.base import Settings

    for configuration in configurations:
        variant = configuration.variant
        settings = Settings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        try:
            model, heads = loading.skeleton(configuration.model, bases, task)
            _check_positions(model, longest(task, configuration.batches.max_length), task)
            if configuration.base_dropout == "on":
                own_dropout.check(model, configuration.model.name)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads)
        except ValueError as error:
            raise BadInput(f"{configuration.model.name} with {variant.name}: {error}") from None
