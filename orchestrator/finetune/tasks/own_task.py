"""Check that a task in a user's file has all that a study needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from orchestrator.finetune.tasks.base import SPLITS, Task, TaskDefaults
from orchestrator.study import bounds, space
from orchestrator.study.configuration import Dtype
from orchestrator.util.errors import BadInput, nearest

ANSWERS = ("forced", "generated", "label", "value")
INPUTS = ("text", "image")
GRADED = ("always", "at the end")
MOST_EXAMPLES = 1_000_000_000
MOST_TOKENS = 10_000_000


def check(task: Task) -> None:
    """Check that a user's task has all that a study needs, of the right kind.

    Raises:
        BadInput: Something is missing or wrong. The text names the first such thing.
    """
    wrong = next(_wrong(task), None)
    if wrong is not None:
        raise BadInput(f"Task file {task.name!r}: {wrong}")


def _wrong(task: Task) -> Iterator[str]:
    if type(task).examples is Task.examples:
        yield f"the task has no examples; add def examples(self, split, count) for {', '.join(SPLITS)}"
    if not hasattr(task, "floor"):
        yield "the task has no floor, the score of a diverged run; add floor = 0.0, or what a guess scores"
    elif not _is_finite(task.floor):
        yield f"floor is {task.floor!r}; must be a finite number"
    if not isinstance(task.metric, str) or task.metric in ("", "loss"):
        yield f"metric is {task.metric!r}; must be a name other than loss"
    for name, value, known in (
        ("answers", task.answers, ANSWERS),
        ("inputs", task.inputs, INPUTS),
        ("graded", task.graded, GRADED),
    ):
        if value not in known:
            yield f"{name} is {value!r}; {nearest(str(value), known)}"
    if task.answers == "label" and len(set(task.labels)) < 2:
        yield f"labels is {task.labels!r}; must name two classes or more"
    yield from (f"{name} is {getattr(task, name)!r}; {rule}" for name, rule in _broken(task, _of_task(task)))
    if isinstance(task.stop, str) or not all(isinstance(word, str) and word for word in task.stop):
        yield f"stop is {task.stop!r}; must be a tuple of texts that are not empty"
    defaults = getattr(task, "defaults", None)
    if not isinstance(defaults, TaskDefaults):
        is_there = "the task has no defaults" if defaults is None else f"defaults is {defaults!r}"
        fields = ", ".join(f"{name}=..." for name in ("train_size", "validation_size", "test_size", "steps"))
        yield f"{is_there}; add defaults = TaskDefaults({fields}, ...)"
        return
    yield from (
        f"{name} is {getattr(defaults, name)!r}; {rule}"
        for name, rule in _broken(defaults, _of_defaults(task))
    )
    if not defaults.learning_rates:
        yield f"learning_rates is {defaults.learning_rates!r}; must have 1 rate or more"
    if (count := len(defaults.learning_rates)) > bounds.POINTS:
        yield f"learning_rates has {count} rates; must have {bounds.POINTS} or fewer"
    for rate in defaults.learning_rates:
        if rule := _rule(space.HYPERPARAMETERS["learning_rate"], rate):
            yield f"learning_rates has {rate!r}; {rule}"


def _of_task(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules of what a task itself says in numbers."""
    found = {
        "numerics": space.count("batches", "numerics", MOST_EXAMPLES),
        "samples": space.count("batches", "samples", MOST_EXAMPLES),
        "temperature": space.Hyperparameter("batches", "temperature", open_below=False),
        "top_p": space.Hyperparameter("batches", "top_p", most=1, open_above=False),
    }
    if task.answers == "generated":
        found["max_new_tokens"] = space.count("batches", "max_new_tokens", MOST_TOKENS)
    return found


def _of_defaults(task: Task) -> dict[str, space.Hyperparameter]:
    """Return the rules of a task's defaults."""
    most = {
        "train_size": MOST_EXAMPLES,
        "validation_size": MOST_EXAMPLES,
        "test_size": MOST_EXAMPLES,
        "steps": bounds.STEPS,
        "batch_size": bounds.BATCH_SIZE,
        "evaluations": bounds.EVALUATIONS,
        "accumulation": bounds.BATCH_SIZE,
        **({"max_length": MOST_TOKENS} if task.inputs == "text" else {}),
    }
    return {
        **{name: space.count("batches", name, limit) for name, limit in most.items()},
        **{name: space.HYPERPARAMETERS[name] for name in ("warmup", "schedule", "weight_decay")},
        "dtype": space.Hyperparameter("batches", "dtype", words=get_args(Dtype)),
        "base_dropout": space.Hyperparameter("batches", "base_dropout", words=("on", "off")),
    }


def _broken(of: object, rules: Mapping[str, space.Hyperparameter]) -> Iterator[tuple[str, str]]:
    """Yield name and rule of each attribute that breaks its rule."""
    for name, known in rules.items():
        if rule := _rule(known, getattr(of, name)):
            yield name, rule


def _rule(known: space.Hyperparameter, value: Any) -> str | None:
    if known.words or _is_finite(value):
        return known.rule(value)
    return "must be a finite number"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
