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
from orchestrator.finetune.tasks.base import HELD_OUT_SPLITS, Example, Split, Task
from orchestrator.study import bounds, rates, space
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    VariantChoice,
)
from orchestrator.study.lr_schedule import warmup_steps
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Space, Value, apply_values
from orchestrator.util import user_code
from orchestrator.util.atomic_files import add_path_to_disk_errors
from orchestrator.util.errors import UsageError, suggest_nearest
from variants import catalogue
from variants.base import AdaptationScope


@dataclass(frozen=True)
class ResolvedOptions:
    """What the options name, checked, before anything is loaded."""

    variants: tuple[str, ...]
    task: Task
    model: str
    learning_rates: tuple[float, ...]
    fixed: Mapping[str, Value] = field(default_factory=dict)
    """What --set says."""
    space: Space | None = None
    """Of a search."""


def resolve_options(
    options: StudyOptions, default_task: str, default_variants: Sequence[str], base_models_folder: Path
) -> ResolvedOptions:
    """Raises BadInput for an unknown variant, task or model, for a head's rate without a head, and for a
    search space that cannot be. Imports neither torch nor transformers but for a search and for --set."""
    hub_data.set_pin_folder(base_models_folder)
    typed = (name.replace("-", "_") for name in options.variants or default_variants)
    variants = tuple(dict.fromkeys(typed))
    for name in variants:
        if name not in catalogue.names():
            raise UsageError(f"--variants: no variant {name!r}. {suggest_nearest(name, catalogue.names())}")
    task = tasks.get(options.task or default_task)
    if task.has_head:
        metrics.get_metric(task)  # raises BadInput for one that is none
    elif options.head_learning_rate != "same":
        raise UsageError(
            f"--head-learning-rate {options.head_learning_rate}: task {task.name!r} has no head; take same."
        )
    options = fill_accumulation(options, task)
    model = options.model or default_model(task)
    loading.find_content(model, base_models_folder)  # raises BadInput for a name that is none
    learning_rates = (
        rates.parse_learning_rates(options.learning_rates)
        if options.learning_rates
        else task.defaults.learning_rates
    )
    bounds.check_grid_size(options.seed_count, len(learning_rates))
    fixed, searched = _parse_fixed_and_space(options, variants, task, learning_rates)
    return ResolvedOptions(variants, task, model, learning_rates, fixed, searched)


def default_model(task: Task) -> str:
    """Return the name of the task's own base model. Raises BadInput for a user's task that names none."""
    if not hasattr(task, "default_model"):
        raise UsageError(
            f"Task {task.name!r} has no default_model; add one to the task, or choose a --model."
        )
    return task.default_model


def fill_accumulation(options: StudyOptions, task: Task) -> StudyOptions:
    """With the task's own parts of a batch where none were typed, or fewer where the batch does not divide by
    them."""
    if options.accumulation is not None:
        return options
    size, max_accumulation = options.batch_size or task.defaults.batch_size, task.defaults.accumulation
    return replace(options, accumulation=max(n for n in range(1, max_accumulation + 1) if size % n == 0))


def resolve_base_model(model: str, base_models_folder: Path, progress: Callable[[str], None] | None) -> str:
    """The content of the base model; made or found first, unless `progress` is None (a plan)."""
    if progress is None:
        return loading.find_content(model, base_models_folder) or UNPREPARED
    return loading.prepare_base_model(model, base_models_folder, progress)


def build_configuration_templates(
    options: StudyOptions, resolved: ResolvedOptions, base_content: str, base_models_folder: Path
) -> list[Configuration]:
    """One configuration a variant, complete but for learning rate and seed (of a search: for what it varies).
    Raises BadInput for a rank or target that the model cannot have, for a variant that does not suit the task
    (as far as the model is there to be asked), and for a space with such values at its ends."""
    task, defaults = resolved.task, resolved.task.defaults
    options = fill_accumulation(options, task)
    model = ModelChoice(resolved.model, base_content, options.dtype or defaults.dtype)
    batch_size, accumulation = options.batch_size or defaults.batch_size, options.accumulation or 1
    options.check_batch_size(batch_size)
    head_rate = None if options.head_learning_rate == "same" else float(options.head_learning_rate)
    with user_code.report_user_errors(task.name, "gives no examples"):
        choice = task.choice()  # reads all of the data
    templates = [
        Configuration(
            variant=_variant_choice(name, options),
            task=choice,
            model=model,
            # The learning rate is replaced by the grid's.
            optimizer=OptimizerConfig(
                learning_rate=1.0, weight_decay=defaults.weight_decay, head_learning_rate=head_rate
            ),
            schedule=LRSchedule(
                options.steps or defaults.steps, options.lr_schedule or defaults.schedule, defaults.warmup
            ),
            batches=BatchConfig(batch_size // accumulation, accumulation, defaults.max_length),
            base_dropout=options.base_dropout or defaults.base_dropout,
            evaluations=min(options.evaluations or defaults.evaluations, options.steps or defaults.steps),
        )
        for name in resolved.variants
    ]
    templates = [
        apply_values(each, _applicable_values(each.variant.name, resolved.fixed)) for each in templates
    ]
    for configuration in templates:
        if any(key.endswith("batch_size") for key in resolved.fixed):
            options.check_batch_size(configuration.batches.batch_size * configuration.batches.accumulation)
    to_check = (
        templates
        if resolved.space is None
        else [c for each in templates for c in corner_configurations(each, resolved.space)]
    )
    for configuration in to_check:
        if (error := find_settings_error(configuration)) is not None:
            raise UsageError(error)
        if configuration.schedule.steps == warmup_steps(configuration.schedule) == 1:
            raise UsageError(
                "--steps 1: the only step would be warm-up, at learning rate 0, and nothing would be learnt; "
                "take more steps, or --set warmup=0."
            )
    if has_layer_shapes(model):
        _check_attach(_distinct_adapters(to_check), task, base_models_folder)
    return templates


def has_layer_shapes(model: ModelChoice) -> bool:
    """Return whether rank and targets can be checked against the model's layers."""
    return model.content != UNPREPARED or loading.unprepared_config(model) is not None


def prepare_datasets(
    configurations: Sequence[Configuration],
    base_models_folder: Path,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Examples and token ids for all of them, in `folder`, made where they are lacking: before a GPU is asked
    for. Raises BadInput when examples cannot be had or tokenised, and OSError when there is no space."""
    from orchestrator.finetune.data import dataset_cache
    from orchestrator.finetune.data.batches import compute_max_row_length

    distinct = {(c.task, c.model, c.batches.max_length): c for c in configurations}
    for configuration in distinct.values():
        task = tasks.get(configuration.task.name)
        processor = loading.load_processor(configuration.model, base_models_folder, task)
        with add_path_to_disk_errors(folder):
            prepared = dataset_cache.prepare_dataset(folder, configuration, task, processor, progress)
        if task.inputs != "image":
            _check_token_ids(configuration, base_models_folder, dataset_cache.max_token_id(prepared))
            longest_row = dataset_cache.compute_max_sequence_length(prepared, task)
            if longest_row > compute_max_row_length(
                task, configuration.batches.max_length
            ):  # else `_check_fit` has compared it
                model, _ = loading.build_meta_model(configuration.model, base_models_folder, task)
                try:
                    _check_positions(model, longest_row, task)
                except ValueError as error:
                    raise UsageError(f"Model {configuration.model.name!r}: {error}") from None
            report_train_overlap(task, prepared.examples, progress)


def report_train_overlap(
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
    for split in HELD_OUT_SPLITS:
        shared = sum((each.prompt, each.pair, each.answer) in train for each in examples[split])
        if shared:
            progress(
                f"{Path(task.name).stem}: {shared} of {len(examples[split])} {split} examples are train "
                "examples as well; their scores show what was learnt by heart"
            )


def _check_token_ids(configuration: Configuration, base_models_folder: Path, largest_id: int) -> None:
    """Raise BadInput where an example has a token for which the model has no embedding."""
    model = configuration.model
    embedding_count = loading.read_vocab_size(model, base_models_folder)
    if embedding_count is not None and largest_id >= embedding_count:
        raise UsageError(
            f"Model {model.name!r}: its tokenizer gives token {largest_id} for an example of task "
            f"{configuration.task.name!r}, and the model has embeddings for {embedding_count} tokens, from 0 on; take "
            "the tokenizer that belongs to the model."
        )


def _applicable_values(variant: str, fixed: Mapping[str, Value]) -> dict[str, Value]:
    """Without what the variant does not have, so that it is no other configuration."""
    own = _variant_hyperparameters(variant) if fixed else {}
    return {key: v for key, v in fixed.items() if key not in space.VARIANT_HYPERPARAMETERS or key in own}


def corner_configurations(configuration: Configuration, search_space: Space) -> list[Configuration]:
    """`configuration` at the ends (and words) of what its variant is made of, in all combinations, and at
    each of its choices."""
    dimensions = [
        d
        for d in search_space.variants[configuration.variant.name]
        if d.variant or d.name in space.VARIANT_HYPERPARAMETERS
    ]
    ends = [
        (d.choices_or_ends[0], d.choices_or_ends[-1]) if d.is_numeric else d.choices_or_ends
        for d in dimensions
    ]
    found = [
        apply_values(configuration, dict(zip((d.key for d in dimensions), values, strict=True)))
        for values in product(*ends)
    ]
    return found + [
        apply_values(found[0], {d.key: value}) for d in dimensions for value in d.choices_or_ends[1:-1]
    ]


def _distinct_adapters(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Those whose adapters differ in shape: a model's skeleton takes a second or two each."""
    found = {(c.variant.name, c.variant.rank, str(c.variant.extra)): c for c in configurations}
    return list(found.values())


def find_settings_error(configuration: Configuration) -> str | None:
    """Why the variant cannot have its settings, in one line, whatever the model; None when it can."""
    from variants.base import VariantSettings

    variant = configuration.variant
    try:
        catalogue.get(variant.name).validate_settings(
            VariantSettings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        )
    except ValueError as error:
        return f"{variant.name}: {error}"
    return None


def _parse_fixed_and_space(
    options: StudyOptions, variants: Sequence[str], task: Task, learning_rates: Sequence[float]
) -> tuple[Mapping[str, Value], Space | None]:
    fixed = space.parse_fixed_values(options.set, variants, _variant_hyperparameters)
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
    words = options.space or ()
    search_space = space.parse_space(words, variants, _variant_hyperparameters, learning_rates, tuple(fixed))
    for dimension in search_space.dimensions:
        _check_has_head(f"--space {dimension.key}", dimension.name, task)
        if dimension.name == "batch_size":
            if not dimension.choices and (options.accumulation or 1) > 1:
                raise UsageError(
                    f"--space {dimension.key}: with --accumulation {options.accumulation} take a choice of "
                    "batch sizes that it divides."
                )
            for value in dimension.choices_or_ends:
                options.check_batch_size(int(value))
    if options.search_method == "cma-es":
        for variant, dimensions in search_space.variants.items():
            if not any(d.is_numeric for d in dimensions):
                raise UsageError(f"--sampler cma-es: {variant} has nothing numeric to search; take tpe.")
    if not search_space.dimensions:
        raise UsageError(
            f"--search {options.search}: nothing varies, neither the learning rate nor anything in --space; "
            "take a --space, rank=4,8 say, or --search grid."
        )
    return fixed, search_space


def _check_has_head(option: str, name: str, task: Task) -> None:
    if name == "head_learning_rate" and not task.has_head:
        raise UsageError(f"{option}: task {task.name!r} has no head; leave it out.")


def _variant_hyperparameters(name: str) -> Mapping[str, Value]:
    """The settings of a variant's own."""
    variant = catalogue.get(name)
    usual = {"rank": variant.uses_rank, "alpha": variant.uses_alpha, "dropout": variant.uses_dropout}
    own: dict[str, Value] = {
        k: 0
        for k, used in usual.items()
        if used and variant.adaptation_scope is AdaptationScope.TARGET_LAYERS
    }
    return own | dict(variant.extra_defaults)


def _variant_choice(name: str, options: StudyOptions) -> VariantChoice:
    """What a variant does not have is alike whatever was typed, so that it is no other configuration."""
    variant = catalogue.get(name)
    return VariantChoice(
        name,
        rank=options.rank if variant.uses_rank else 0,
        alpha=options.alpha if variant.uses_alpha else None,
        dropout=options.dropout
        if variant.uses_dropout and variant.adaptation_scope is AdaptationScope.TARGET_LAYERS
        else 0.0,
        targets=options.targets if variant.adaptation_scope is AdaptationScope.TARGET_LAYERS else "blocks",
        extra=dict(variant.extra_defaults),
        numerics=variant.numerics,
    )


def _check_positions(model: Any, length: int, task: Task) -> None:
    """Raise ValueError where `most` tokens of a text, or of a prompt and what is generated to it, are more
    than the model has positions for."""
    max_positions = model_checks.max_learned_positions(model)
    if max_positions is not None and length > max_positions:
        raise ValueError(
            f"it has positions for {max_positions} tokens, and task {task.name!r} needs up to {length}; take another "
            "--model, or shorter texts"
        )


def _check_attach(configurations: Sequence[Configuration], task: Task, base_models_folder: Path) -> None:
    """Attaches each variant to the model's shapes (no weights): what would fail on a GPU fails here."""
    from orchestrator.finetune.data.batches import compute_max_row_length
    from orchestrator.finetune.models import attention_dropout
    from variants.attach import attach
    from variants.base import VariantSettings

    for configuration in configurations:
        variant = configuration.variant
        settings = VariantSettings(variant.rank, variant.alpha, variant.dropout, variant.extra)
        try:
            model, heads = loading.build_meta_model(configuration.model, base_models_folder, task)
            _check_positions(model, compute_max_row_length(task, configuration.batches.max_length), task)
            if configuration.base_dropout == "on":
                attention_dropout.check_dropout_supported(model, configuration.model.name)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads)
        except ValueError as error:
            raise UsageError(f"{configuration.model.name} with {variant.name}: {error}") from None
