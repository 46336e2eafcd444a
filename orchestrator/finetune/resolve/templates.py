"""Make one complete, checked configuration for each variant of a study."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve.data import check_positions, measure_max_length
from orchestrator.finetune.resolve.option_names import (
    ResolvedOptions,
    fill_accumulation,
    variant_hyperparameters,
)
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import names as task_names
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.finetune.tasks.pretraining import PretrainedTask
from orchestrator.study import space
from orchestrator.study.configuration import (
    HYPERPARAMETERS,
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    Value,
    VariantChoice,
    warmup_steps,
)
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Space, apply_values
from orchestrator.util.errors import UsageError, format_error, report_user_errors
from variants import catalogue
from variants.catalogue import cached, source_digest
from variants.variant_settings import AdaptationScope

_PROGRAM = Path(__file__).parents[2]
_ARTICLES = {"image": "an image", "text": "a text"}


def build_configuration_templates(
    options: StudyOptions, resolved: ResolvedOptions, base_content: str, bases: Path
) -> list[Configuration]:
    """Build one configuration for each variant and check it, as far as the base model is available.

    Args:
        options: The options of the command line.
        resolved: The values that the names in the options stand for.
        base_content: The content of the base model, or `UNPREPARED`.
        bases: The store's folder of base models.

    Returns:
        Configurations that are complete except for the learning rate, the seed, and the hyperparameters that
        a search varies.

    Raises:
        UsageError: A setting is impossible for a variant, the model or the task. In a search, this includes
            the settings at every corner of the space.
    """
    task, defaults = resolved.task, resolved.task.defaults
    options = fill_accumulation(options, task)
    model = ModelChoice(resolved.model, base_content, options.dtype or defaults.dtype)
    if isinstance(task, DataTask):
        _check_inputs(model, task, bases)  # before a user's data are read
    batch_size, accumulation = options.batch_size or defaults.batch_size, options.accumulation or 1
    options.check_batch_size(batch_size)
    head_rate = None if options.head_learning_rate == "same" else float(options.head_learning_rate)
    with report_user_errors(task.source, "gives no examples"):
        choice = task.choice()  # reads all of the data
    sizes: dict[str, Any] = {"train_size": options.train_size, "test_size": options.test_size}
    choice = replace(choice, **{name: size for name, size in sizes.items() if size is not None})
    if isinstance(task, DataTask):
        task.load(choice)  # refuses sizes that the data do not have, also for a plan
    max_length = _max_length(options, task, model, bases)
    publishes_best = options.select == "published" and task.publishes_best_evaluation
    templates = [
        Configuration(
            variant=_variant_choice(name, options),
            task=choice,
            model=model,
            # The learning rate is a placeholder: the grid or the search sets it.
            optimizer=OptimizerConfig(1.0, defaults.weight_decay, head_learning_rate=head_rate),
            lr_schedule=LRSchedule(
                options.steps or defaults.steps, options.lr_schedule or defaults.schedule, defaults.warmup
            ),
            batches=BatchConfig(batch_size // accumulation, accumulation, max_length),
            base_dropout=options.base_dropout or defaults.base_dropout,
            evaluations=options.evaluations or defaults.evaluations,
            test_evaluations="every" if publishes_best else "last",
        )
        for name in resolved.variants
    ]
    templates = [apply_values(t, _applicable_values(t.variant.name, resolved.fixed)) for t in templates]
    templates = [apply_values(t, {"steps": _count_steps(t, options.epochs)}) for t in templates]
    _check_sizes(templates, options, task)
    _check_fit(templates, options, resolved, bases)
    return templates


def _check_sizes(templates: Sequence[Configuration], options: StudyOptions, task: Task) -> None:
    for template in templates:  # --set may have changed the batch size
        batches = template.batches
        size = batches.batch_size * batches.accumulation
        options.check_batch_size(size)
        if size > template.task.train_size and size != task.defaults.batch_size:
            raise UsageError(
                f"batch size {size}: task {task.name!r} trains on {template.task.train_size} examples; take "
                f"--batch-size {template.task.train_size} or less."
            )
        if (options.evaluations or 1) > template.lr_schedule.steps:
            steps = template.lr_schedule.steps
            raise UsageError(
                f"--evaluations {options.evaluations}: a fine-tune has {steps} steps; take {steps} or less."
            )


def _count_steps(template: Configuration, epochs: float | None) -> int:
    """Return the optimizer steps of a fine-tune: those of --epochs, else of the template."""
    if epochs is None:
        return template.lr_schedule.steps
    batch_size = template.batches.batch_size * template.batches.accumulation
    steps = max(1, int(epochs * template.task.train_size / batch_size))
    if broken := HYPERPARAMETERS["steps"].find_violation(steps):
        raise UsageError(f"--epochs {epochs:g}: {steps} steps of {batch_size}; {broken}.")
    return steps


def _max_length(options: StudyOptions, task: Task, model: ModelChoice, bases: Path) -> int:
    """Return the maximum number of tokens of an example: from --max-length, or the task's default."""
    if options.max_length is None:
        return measure_max_length(task, model, bases)
    if task.inputs == "image":
        raise UsageError(
            f"--max-length {options.max_length}: task {task.name!r} has images, which have no length; leave "
            "it out."
        )
    if options.max_length == 1:
        raise UsageError("--max-length 1: an example has a token to read and one to learn; take 2 or more.")
    return options.max_length


def _check_fit(
    templates: Sequence[Configuration], options: StudyOptions, resolved: ResolvedOptions, bases: Path
) -> None:
    """Check that variants accept their settings, and that they fit the base model, as far as it is available.

    The check imports torch and builds the model without weights, which takes seconds. A check that succeeds
    is therefore cached. It is not cached if its result depends on code from outside this project or on the
    machine.
    """
    to_check = list(templates)
    if resolved.space is not None:
        to_check = [c for each in templates for c in corner_configurations(each, resolved.space)]
    for configuration in to_check:
        _check_schedule(configuration.lr_schedule)

    def check() -> bool:
        _check_models(to_check, options, resolved.task, bases)
        return True

    own_task = isinstance(resolved.task, DataTask) or resolved.task.name in task_names()
    own_variants = {c.variant.name for c in to_check} <= set(catalogue.built_in_names())
    if not own_task or not own_variants or options.kernels == "liger":
        check()
        return
    keys = {f"{c.group_key} {c.variant.alpha} {c.model.name} {c.task.name}" for c in to_check}
    versions = [source_digest(_PROGRAM), *(version(name) for name in ("torch", "transformers"))]
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:32]
    cached(f"fit-{name}", check, " ".join(versions))


def _check_models(
    configurations: Sequence[Configuration], options: StudyOptions, task: Task, bases: Path
) -> None:
    """Do what `_check_fit` does for configurations, except for their schedules."""
    model = configurations[0].model  # all have the same
    _check_inputs(model, task, bases)
    for configuration in configurations:
        if (error := find_settings_error(configuration)) is not None:
            raise UsageError(error)
    if loading.has_config(model):
        if options.kernels == "liger":
            from orchestrator.finetune.models import changes  # imports torch

            changes.check_liger(loading.read_config(model, bases).model_type, model.name)
        # Building a model without weights takes seconds, so each adapter shape is checked once.
        distinct = {(c.variant.name, c.variant.rank, str(c.variant.extra)): c for c in configurations}
        check_attach(list(distinct.values()), task, bases)


def _check_schedule(schedule: LRSchedule) -> None:
    """Raise UsageError for a schedule with which nothing is learned, or that ignores one of its settings."""
    if schedule.steps == warmup_steps(schedule) == 1:
        raise UsageError(
            "--steps 1: the only step would be warm-up, at learning rate 0, so nothing would be learned; "
            "take more steps, or --set warmup=0."
        )
    if schedule.name == "constant" and schedule.final_factor:
        raise UsageError(
            f"--set final_factor={schedule.final_factor:g}: a constant schedule stays at its peak; take "
            "--lr-schedule cosine or linear, or --set final_factor=0."
        )


def corner_configurations(configuration: Configuration, search_space: Space) -> list[Configuration]:
    """Return the configurations at the corners of a search space.

    Args:
        configuration: The template of a variant.
        search_space: Its dimensions that are no hyperparameters of the variant are ignored.

    Returns:
        All combinations of the ends of numeric dimensions and of the choices of the others, then each
        further choice alone.
    """
    own = search_space[configuration.variant.name]
    dimensions = [d for d in own if d.variant or d.name in space.VARIANT_HYPERPARAMETERS]
    keys, choices = [d.key for d in dimensions], [d.choices_or_ends for d in dimensions]
    ends = [(c[0], c[-1]) if d.is_numeric else c for c, d in zip(choices, dimensions, strict=True)]
    corners = [apply_values(configuration, dict(zip(keys, values, strict=True))) for values in product(*ends)]
    return corners + [
        apply_values(corners[0], {d.key: value}) for d in dimensions for value in d.choices_or_ends[1:-1]
    ]


def find_settings_error(configuration: Configuration) -> str | None:
    """Return why the variant refuses its settings, in one line; None if it accepts them.

    The base model is not needed.
    """
    from orchestrator.finetune.engine.lane import variant_settings

    name = configuration.variant.name
    try:
        catalogue.get(name).validate_settings(variant_settings(configuration))
    except ValueError as error:
        return f"{name}: {error}"
    return None


def _applicable_values(variant: str, fixed: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values without hyperparameters that the variant lacks.

    Such a value would change the fingerprint and not the training.
    """
    own = variant_hyperparameters(variant) if fixed else {}
    return {key: v for key, v in fixed.items() if key not in space.VARIANT_HYPERPARAMETERS or key in own}


def _variant_choice(name: str, options: StudyOptions) -> VariantChoice:
    """Return the variant with its settings; options that it does not use have one fixed value.

    Without that, an option without effect would change the fingerprint.
    """
    variant = catalogue.traits(name)
    adapts_layers = variant["adaptation_scope"] == AdaptationScope.TARGET_LAYERS
    return VariantChoice(
        name,
        rank=options.rank if variant["uses_rank"] else 0,
        alpha=options.alpha if variant["uses_alpha"] else None,
        dropout=options.dropout if variant["uses_dropout"] and adapts_layers else 0.0,
        targets=options.targets if adapts_layers else "blocks",
        extra=dict(variant["extra_defaults"]),
        numerics=variant["numerics"],
        revision=variant["revision"],
    )


def check_attach(configurations: Sequence[Configuration], task: Task, bases: Path) -> None:
    """Attach each configuration's variant to the base model without weights.

    An error that would end a lane on a GPU is found here, before any machine is requested.

    Args:
        configurations: Configurations of one task and base model.
        task: The task.
        bases: The store's folder of base models.

    Raises:
        UsageError: The variant's rank or targets do not fit the model, the model lacks positions for the
            task's texts, or it does not support `base_dropout`.
    """
    from orchestrator.finetune.data.batches import compute_max_row_length
    from orchestrator.finetune.engine.lane import variant_settings
    from orchestrator.finetune.models import changes
    from variants.adapters import attach

    choice = configurations[0].model
    model, heads = loading.build_meta_model(choice, bases, task)
    for configuration in configurations:
        variant, settings = configuration.variant, variant_settings(configuration)
        longest = compute_max_row_length(task, configuration.batches.max_length)
        check_positions(model, choice.name, longest, task)
        try:
            if configuration.base_dropout == "on":
                changes.check_dropout_supported(model, choice.name)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads).detach()
        except ValueError as error:
            reason = " ".join(str(error).split())  # PEFT's and transformers' errors may have many lines
            raise UsageError(f"{choice.name} with {variant.name}: {reason}") from None


def count_trainable(configuration: Configuration, bases: Path) -> int:
    """Return the number of trainable parameters of a variant's adapters, without a head.

    Raises:
        UsageError: The base model is not on this machine yet, or the variant does not fit it.
    """
    from orchestrator.finetune.engine.lane import variant_settings
    from variants.adapters import attach
    from variants.describe import count_parameters

    choice, variant, task = configuration.model, configuration.variant, tasks.get(configuration.task.name)
    if not loading.has_config(choice):
        raise UsageError(
            f"--link parameters: the layers of {choice.name} are unknown until it is on this machine; start "
            "without --plan, or run `lora-orchestrator fetch model`."
        )
    model, heads = loading.build_meta_model(choice, bases, task)
    rule, settings = catalogue.get(variant.name), variant_settings(configuration)
    layers = attach(model, rule, settings, variant.targets, heads).layers
    shapes = {name: layer.frozen_layer.shape for name, layer in layers.items()}
    return count_parameters(rule, settings, shapes) or 0


def _check_inputs(model: ModelChoice, task: Task, bases: Path) -> None:
    """Check that a base model can read a task's inputs, as far as that is known without its weights.

    The small base model of another task may lack the words or the image size of a user's data.
    """
    if model.name == getattr(task, "default_model", None):
        return
    kind = loading.input_kind(model, bases)
    if kind and kind != task.inputs:
        raise UsageError(
            f"--model {model.name}: is {_ARTICLES[kind]} model, and task {task.name!r} has {task.inputs}s; "
            f"take {_ARTICLES[task.inputs]} model."
        )
    base = model_catalogue.task_bases().get(model.name)
    if not isinstance(base, PretrainedTask) or not isinstance(task, DataTask):
        return
    if problem := _find_unread_example(base, task):
        raise UsageError(
            f"--model {model.name}: it is a small model for task {base.name!r}, and cannot read task "
            f"{task.name!r}: {problem}; take another --model, for example {task.default_model}."
        )


def _find_unread_example(base: PretrainedTask, task: Task) -> str:
    """Return why a small base model cannot read the first examples of another task; empty if it can."""
    examples = task.examples("train", 20)
    if task.inputs == "text":
        try:
            task.encode_all(examples, base.processor())
        except Exception as error:  # the tokenizers of Hugging Face raise Exception itself
            return format_error(error)
        return ""
    side = base.base_config().image_size
    for image in (example.image for example in examples if example.image is not None):
        width, height = image.decode().size
        if (width, height) != (side, side):
            return f"{image.name} has {width} x {height} pixels, and the model takes {side} x {side}"
    return ""
