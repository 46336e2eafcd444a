"""Validation of a task in a user's file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from orchestrator.finetune.tasks.base import SPLITS, GradeAt, Output, Task, TaskDefaults
from orchestrator.study import bounds, space
from orchestrator.study.configuration import Dtype
from orchestrator.util.errors import UsageError, suggest_nearest

MAX_EXAMPLES = 1_000_000_000
MAX_TOKENS = 10_000_000


def check(task: Task) -> None:
    """Check that a task has everything that a study needs, with valid values.

    Args:
        task: The task of a user's file.

    Raises:
        UsageError: Something is missing or invalid. The message names the first such attribute.
    """
    problem = next(_find_problems(task), None)
    if problem is not None:
        raise UsageError(f"Task file {task.source!r}: {problem}")


def _find_problems(task: Task) -> Iterator[str]:
    yield from _find_missing(task)
    yield from _find_unknown_choices(task)
    yield from _find_broken_rules(task, _task_rules(task))
    if isinstance(task.stop, str) or not all(isinstance(text, str) and text for text in task.stop):
        yield f"stop is {task.stop!r}; must be a tuple of texts that are not empty"
    defaults = getattr(task, "defaults", None)
    if not isinstance(defaults, TaskDefaults):
        problem = "the task has no defaults" if defaults is None else f"defaults is {defaults!r}"
        fields = ", ".join(f"{name}=..." for name in ("train_size", "validation_size", "test_size", "steps"))
        yield f"{problem}; add defaults = TaskDefaults({fields}, ...)"
        return
    yield from _find_broken_rules(defaults, _default_rules(task))
    yield from _find_bad_learning_rates(defaults.learning_rates)


def _find_missing(task: Task) -> Iterator[str]:
    if type(task).examples is Task.examples:
        yield f"the task has no examples; add def examples(self, split, count) for {', '.join(SPLITS)}"
    if not hasattr(task, "floor"):
        yield "the task has no floor, the score of a diverged run; add floor = 0.0, or the score of a guess"
    elif not _is_finite(task.floor):
        yield f"floor is {task.floor!r}; must be a finite number"


def _find_unknown_choices(task: Task) -> Iterator[str]:
    if not isinstance(task.metric, str) or task.metric in ("", "loss"):
        yield f"metric is {task.metric!r}; must be a name other than loss; inverse_perplexity is exp(-loss)"
    for name, value, choices in (
        ("output", task.output, get_args(Output)),
        ("inputs", task.inputs, ("text", "image")),
        ("grade_at", task.grade_at, get_args(GradeAt)),
    ):
        if value not in choices:
            yield f"{name} is {value!r}; {suggest_nearest(str(value), choices)}"
    if task.output == "classification" and len(set(task.labels)) < 2:
        yield f"labels is {task.labels!r}; must name two classes or more"


def _find_bad_learning_rates(rates: Sequence[float]) -> Iterator[str]:
    if not rates:
        yield f"learning_rates is {rates!r}; must have 1 rate or more"
    if len(rates) > bounds.MAX_POINTS:
        yield f"learning_rates has {len(rates)} rates; must have {bounds.MAX_POINTS} or fewer"
    for rate in rates:
        if rule := _broken_rule(space.HYPERPARAMETERS["learning_rate"], rate):
            yield f"learning_rates has {rate!r}; {rule}"


def _task_rules(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules for the numeric attributes of a task."""
    rules = {
        "numerics": space.int_hyperparameter("batches", "numerics", MAX_EXAMPLES),
        "samples": space.int_hyperparameter("batches", "samples", MAX_EXAMPLES),
        "temperature": space.Hyperparameter("batches", "temperature", low_exclusive=False),
        "top_p": space.Hyperparameter("batches", "top_p", high=1, high_exclusive=False),
    }
    if task.output == "generation":
        rules["max_new_tokens"] = space.int_hyperparameter("batches", "max_new_tokens", MAX_TOKENS)
    return rules


def _default_rules(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules for the defaults of a task."""
    limits = {
        "train_size": MAX_EXAMPLES,
        "validation_size": MAX_EXAMPLES,
        "test_size": MAX_EXAMPLES,
        "steps": bounds.MAX_STEPS,
        "batch_size": bounds.MAX_BATCH_SIZE,
        "evaluations": bounds.MAX_EVALUATIONS,
        "accumulation": bounds.MAX_BATCH_SIZE,
        **({"max_length": MAX_TOKENS} if task.inputs == "text" else {}),
    }
    return {
        **{name: space.int_hyperparameter("batches", name, limit) for name, limit in limits.items()},
        **{name: space.HYPERPARAMETERS[name] for name in ("warmup", "schedule", "weight_decay")},
        "dtype": space.Hyperparameter("batches", "dtype", choices=get_args(Dtype)),
        "base_dropout": space.Hyperparameter("batches", "base_dropout", choices=("on", "off")),
    }


def _find_broken_rules(owner: object, rules: Mapping[str, space.Hyperparameter]) -> Iterator[str]:
    for name, hyperparameter in rules.items():
        if rule := _broken_rule(hyperparameter, getattr(owner, name)):
            yield f"{name} is {getattr(owner, name)!r}; {rule}"


def _broken_rule(hyperparameter: space.Hyperparameter, value: Any) -> str | None:
    if hyperparameter.choices or _is_finite(value):
        return hyperparameter.find_violation(value)
    return "must be a finite number"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
