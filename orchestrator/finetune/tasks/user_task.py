"""Check that a task in a user's file has all that a study needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from orchestrator.finetune.tasks.base import SPLITS, Task, TaskDefaults
from orchestrator.study import bounds, space
from orchestrator.study.configuration import Dtype
from orchestrator.util.errors import UsageError, suggest_nearest

OUTPUTS = ("teacher_forced", "generation", "classification", "regression")
INPUTS = ("text", "image")
GRADE_AT = ("every_evaluation", "last_evaluation")
RENAMED_ATTRIBUTES = {
    "answers": "output",
    "graded": "grade_at",
    "can_grade": "check_can_grade",
    "encode_cut": "encode_truncated",
}
"""Attributes of a task by their names in earlier versions, and their names now."""
RENAMED_VALUES = {
    "forced": "teacher_forced",
    "generated": "generation",
    "label": "classification",
    "value": "regression",
    "always": "every_evaluation",
    "at the end": "last_evaluation",
}
"""Values of `output` and `grade_at` in earlier versions, and those of now."""
MAX_EXAMPLES = 1_000_000_000
MAX_TOKENS = 10_000_000


def check(task: Task) -> None:
    """Check that a user's task has all that a study needs, of the right kind.

    Raises:
        BadInput: Something is missing or wrong. The text names the first such thing.
    """
    problem = next(_find_problems(task), None)
    if problem is not None:
        raise UsageError(f"Task file {task.name!r}: {problem}")


def _find_problems(task: Task) -> Iterator[str]:
    for old, new in RENAMED_ATTRIBUTES.items():
        if hasattr(task, old):
            value = RENAMED_VALUES.get(getattr(task, old)) if old in ("answers", "graded") else None
            yield f"{old} is now called {new}; rename it" + (f", with the value {value!r}" if value else "")
    if type(task).examples is Task.examples:
        yield f"the task has no examples; add def examples(self, split, count) for {', '.join(SPLITS)}"
    if not hasattr(task, "floor"):
        yield "the task has no floor, the score of a diverged run; add floor = 0.0, or what a guess scores"
    elif not _is_finite(task.floor):
        yield f"floor is {task.floor!r}; must be a finite number"
    if not isinstance(task.metric, str) or task.metric in ("", "loss"):
        yield f"metric is {task.metric!r}; must be a name other than loss"
    for name, value, known in (
        ("output", task.output, OUTPUTS),
        ("inputs", task.inputs, INPUTS),
        ("grade_at", task.grade_at, GRADE_AT),
    ):
        if value not in known:
            renamed = RENAMED_VALUES.get(str(value))
            fix = f"it is now called {renamed!r}" if renamed in known else suggest_nearest(str(value), known)
            yield f"{name} is {value!r}; {fix}"
    if task.output == "classification" and len(set(task.labels)) < 2:
        yield f"labels is {task.labels!r}; must name two classes or more"
    yield from (
        f"{name} is {getattr(task, name)!r}; {rule}"
        for name, rule in _find_broken_rules(task, _task_rules(task))
    )
    if isinstance(task.stop, str) or not all(isinstance(word, str) and word for word in task.stop):
        yield f"stop is {task.stop!r}; must be a tuple of texts that are not empty"
    defaults = getattr(task, "defaults", None)
    if not isinstance(defaults, TaskDefaults):
        problem = "the task has no defaults" if defaults is None else f"defaults is {defaults!r}"
        fields = ", ".join(f"{name}=..." for name in ("train_size", "validation_size", "test_size", "steps"))
        yield f"{problem}; add defaults = TaskDefaults({fields}, ...)"
        return
    yield from (
        f"{name} is {getattr(defaults, name)!r}; {rule}"
        for name, rule in _find_broken_rules(defaults, _default_rules(task))
    )
    if not defaults.learning_rates:
        yield f"learning_rates is {defaults.learning_rates!r}; must have 1 rate or more"
    if (count := len(defaults.learning_rates)) > bounds.MAX_POINTS:
        yield f"learning_rates has {count} rates; must have {bounds.MAX_POINTS} or fewer"
    for rate in defaults.learning_rates:
        if rule := _broken_rule(space.HYPERPARAMETERS["learning_rate"], rate):
            yield f"learning_rates has {rate!r}; {rule}"


def _task_rules(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules of what a task itself says in numbers."""
    found = {
        "numerics": space.int_hyperparameter("batches", "numerics", MAX_EXAMPLES),
        "samples": space.int_hyperparameter("batches", "samples", MAX_EXAMPLES),
        "temperature": space.Hyperparameter("batches", "temperature", low_exclusive=False),
        "top_p": space.Hyperparameter("batches", "top_p", high=1, high_exclusive=False),
    }
    if task.output == "generation":
        found["max_new_tokens"] = space.int_hyperparameter("batches", "max_new_tokens", MAX_TOKENS)
    return found


def _default_rules(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules of a task's defaults."""
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


def _find_broken_rules(owner: object, rules: Mapping[str, space.Hyperparameter]) -> Iterator[tuple[str, str]]:
    """Yield name and rule of each attribute that breaks its rule."""
    for name, known in rules.items():
        if rule := _broken_rule(known, getattr(owner, name)):
            yield name, rule


def _broken_rule(hyperparameter: space.Hyperparameter, value: Any) -> str | None:
    if hyperparameter.choices or _is_finite(value):
        return hyperparameter.find_violation(value)
    return "must be a finite number"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
