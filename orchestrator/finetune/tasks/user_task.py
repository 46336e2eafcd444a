"""Validation of a task in a user's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from orchestrator.finetune.tasks.base import SPLITS, GradeAt, Output, Task, TaskDefaults
from orchestrator.study.configuration import HYPERPARAMETERS, Dtype, Hyperparameter
from orchestrator.study.grids import MAX_POINTS
from orchestrator.util.errors import UsageError, suggest_nearest

MAX_EXAMPLES = 1_000_000_000
MAX_TOKENS = 10_000_000
MAX_EVALUATIONS = 100_000


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
    elif rule := Hyperparameter(value_type=float).find_violation(task.floor):
        yield f"floor is {task.floor!r}; {rule}"


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
    if len(rates) > MAX_POINTS:
        yield f"learning_rates has {len(rates)} rates; must have {MAX_POINTS} or fewer"
    for rate in rates:
        if rule := HYPERPARAMETERS["learning_rate"].find_violation(rate):
            yield f"learning_rates has {rate!r}; {rule}"


def _task_rules(task: Task) -> dict[str, Hyperparameter]:
    """Return the rules for the numeric attributes of a task."""
    count = Hyperparameter(value_type=int, ge=1, le=MAX_EXAMPLES)
    rules = {
        "numerics": count,
        "samples": count,
        "temperature": Hyperparameter(value_type=float, ge=0),
        "top_p": Hyperparameter(value_type=float, gt=0, le=1),
    }
    return rules | ({"max_new_tokens": replace(count, le=MAX_TOKENS)} if task.output == "generation" else {})


def _default_rules(task: Task) -> dict[str, Hyperparameter]:
    """Return the rules for the defaults of a task."""
    count = Hyperparameter(value_type=int, ge=1, le=MAX_EXAMPLES)
    rules = {
        name: HYPERPARAMETERS[name] for name in ("steps", "batch_size", "warmup", "schedule", "weight_decay")
    }
    rules |= dict.fromkeys(("train_size", "validation_size", "test_size"), count)
    rules |= {
        "evaluations": replace(count, le=MAX_EVALUATIONS),
        "accumulation": HYPERPARAMETERS["batch_size"],
    }
    rules |= {"max_length": replace(count, le=MAX_TOKENS)} if task.inputs == "text" else {}
    rules["dtype"] = Hyperparameter(choices=get_args(Dtype))
    return rules | {"base_dropout": Hyperparameter(choices=("on", "off"))}


def _find_broken_rules(owner: object, rules: Mapping[str, Hyperparameter]) -> Iterator[str]:
    for name, hyperparameter in rules.items():
        if rule := hyperparameter.find_violation(getattr(owner, name)):
            yield f"{name} is {getattr(owner, name)!r}; {rule}"
