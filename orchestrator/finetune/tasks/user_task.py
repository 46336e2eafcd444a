"""Tasks made of entries of a TOML file, and the rules for what users write: entries and classes."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import MISSING, fields
from fractions import Fraction
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from orchestrator.finetune.tasks import SHARED, read_tasks
from orchestrator.finetune.tasks.base import SPLITS, Task, TaskDefaults
from orchestrator.finetune.tasks.hub_tasks import HubTask, ImageTask, InstructionTask, TextLabelTask
from orchestrator.study.configuration import HYPERPARAMETERS, Hyperparameter
from orchestrator.study.grids import MAX_POINTS
from orchestrator.study.option import broken_rule
from orchestrator.util.errors import UsageError, suggest_nearest

KINDS: Mapping[str, type[HubTask]] = {
    "text_labels": TextLabelTask,
    "images": ImageTask,
    "instruction": InstructionTask,
}
UNHASHED_SETTINGS = {"title", "default_model", *(field.name for field in fields(TaskDefaults))}
"""Settings of an entry that do not change what a configuration computes."""


def make_task(name: str, entry: Mapping[str, Any]) -> Task:
    """Return the task of an entry.

    Args:
        name: The name of the task.
        entry: Keys and values: the kind, or the name of shared settings, then attributes of the task and of
            its `TaskDefaults`.

    Raises:
        UsageError: A key is unknown or missing, or a value has another type.
    """
    settings = share_settings(name, entry)
    kind, path = settings.pop("kind", None), settings.pop("class", "")
    task_class: Any = KINDS.get(str(kind))
    if path:
        module, _, class_name = path.partition(":")
        task_class = getattr(importlib.import_module(f"{__package__}.{module}"), class_name)
    if task_class is None:
        raise UsageError(f"Task {name!r}: kind is {kind!r}; {suggest_nearest(str(kind), list(KINDS))}")
    if issubclass(task_class, LocalTask):
        return task_class()
    return task_class(name, _parse_settings(name, settings, task_class))


class LocalTask(Task):
    """A task of this project that makes its examples itself.

    A subclass names its entry in `tasks.toml`, whose settings become attributes of the class:
    `class Letters(LocalTask, entry="letters")`.
    """

    keys = (
        *("title", "metric", "floor", "default_model", "output", "inputs", "max_new_tokens"),
        *("grader", "grade_at"),
    )

    def __init_subclass__(cls, entry: str = "") -> None:
        if entry:
            cls.name = entry
            settings = {key: value for key, value in read_tasks()[entry].items() if key != "class"}
            for key, value in _parse_settings(entry, settings, cls).items():
                setattr(cls, key, value)


def _parse_settings(name: str, settings: Mapping[str, Any], task_class: Any) -> dict[str, Any]:
    found = {key: _parse_value(name, key, value, task_class) for key, value in settings.items()}
    required = [key for key in task_class.keys if not hasattr(task_class, key) and key != "floor"]
    required += [field.name for field in fields(TaskDefaults) if field.default is MISSING]
    if task_class.inputs == "text":
        required.append("floor")
    if missing := [key for key in required if key not in found]:
        raise UsageError(f"Task {name!r}: the entry has no {missing[0]}; add {missing[0]} = ...")
    names = {field.name for field in fields(TaskDefaults)}
    found["defaults"] = TaskDefaults(**{key: found.pop(key) for key in names & found.keys()})
    return found


@cache
def _adapters(task_class: Any) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Return the type and the parser of each key that an entry may have."""
    own = get_type_hints(task_class)
    types = {key: own[key] for key in task_class.keys} | get_type_hints(TaskDefaults)
    return {key: (each, TypeAdapter(each)) for key, each in (types | {"floor": float | str}).items()}


def share_settings(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an entry together with the shared ones that it names.

    Args:
        name: The name of the task, for the error.
        entry: The entry.

    Raises:
        UsageError: There are no shared settings of that name.
    """
    shared = read_tasks()[SHARED]
    settings = dict(entry)
    group = settings.pop("defaults", None)
    if group is not None and group not in shared:
        raise UsageError(f"Task {name!r}: defaults is {group!r}; {suggest_nearest(str(group), list(shared))}")
    return {**shared.get(group, {}), **settings}


def _parse_value(name: str, key: str, value: Any, task_class: Any) -> Any:
    adapters = _adapters(task_class)
    if key not in adapters:
        raise UsageError(f"Task {name!r}: unknown key {key!r}. {suggest_nearest(key, sorted(adapters))}")
    annotation, adapter = adapters[key]
    try:
        found = adapter.validate_json(json.dumps(value, default=str), strict=True)
        return float(Fraction(found)) if key == "floor" and isinstance(found, str) else found
    except ValidationError as error:
        problem = error.errors()[0]
        is_choice = problem["type"] == "literal_error"
        rule = suggest_nearest(str(value), get_args(annotation)) if is_choice else broken_rule(problem)
    except (ValueError, ZeroDivisionError):
        rule = 'must be a number or a fraction, "1/3"'
    raise UsageError(f"Task {name!r}: {key} is {value!r}; {rule}")


def hash_entry(name: str, entry: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of a SHA-256 of what decides the results of a user's entry."""
    settings = share_settings(name, entry)
    kept = {key: value for key, value in settings.items() if key not in UNHASHED_SETTINGS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    if type(task).examples is Task.examples:
        yield f"the task has no examples; add def examples(self, split, count) for {', '.join(SPLITS)}"
    if not hasattr(task, "floor"):
        yield "the task has no floor, the score of a diverged run; add floor = 0.0, or the score of a guess"
    if not isinstance(task.metric, str) or task.metric in ("", "loss"):
        yield f"metric is {task.metric!r}; must be a name other than loss; inverse_perplexity is exp(-loss)"
    if task.output == "classification" and len(set(task.labels)) < 2:
        yield f"labels is {task.labels!r}; must name two classes or more"
    unused = set() if task.output == "generation" else {"max_new_tokens"}
    unused |= set() if task.inputs == "text" else {"max_length"}
    yield from _find_broken_rules(task, type(task) if isinstance(task, HubTask) else Task, unused)
    if isinstance(task.stop, str) or not all(isinstance(text, str) and text for text in task.stop):
        yield f"stop is {task.stop!r}; must be a tuple of texts that are not empty"
    defaults = getattr(task, "defaults", None)
    if not isinstance(defaults, TaskDefaults):
        problem = "the task has no defaults" if defaults is None else f"defaults is {defaults!r}"
        names = ", ".join(f"{name}=..." for name in ("train_size", "validation_size", "test_size", "steps"))
        yield f"{problem}; add defaults = TaskDefaults({names}, ...)"
        return
    yield from _find_broken_rules(defaults, TaskDefaults, unused)
    if not 1 <= len(defaults.learning_rates) <= MAX_POINTS:
        yield f"learning_rates has {len(defaults.learning_rates)} rates; must have 1 to {MAX_POINTS}"
    for rate in defaults.learning_rates:
        if rule := HYPERPARAMETERS["learning_rate"].find_violation(rate):
            yield f"learning_rates has {rate!r}; {rule}"


def _find_broken_rules(owner: object, declared: type, unused: Container[str]) -> Iterator[str]:
    """Yield a line for each attribute of `owner` outside the choices or bounds that a class declares."""
    for name, hint in get_type_hints(declared, include_extras=True).items():
        rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Hyperparameter)]
        if get_origin(hint) is Literal:
            rules.append(Hyperparameter(choices=get_args(hint)))
        value = getattr(owner, name, None)
        for rule in rules:
            if name not in unused and (broken := rule.find_violation(value)):
                near = suggest_nearest(str(value), rule.choices, " ") if rule.choices else ""
                yield f"{name} is {value!r}; {broken}. {near}".rstrip(" .")
