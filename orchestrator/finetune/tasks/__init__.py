"""Tasks: examples, how they become a model's inputs, metrics and grading.

This module has the names of tasks without an import of any task, since `--help` lists them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

ENTRY_POINT_GROUP = "lora_orchestrator.tasks"
"""Group of the entry points that a package registers its tasks under: NAME = "module:Class"."""
SHARED = "defaults"
"""The table of `tasks.toml` with settings that several entries share."""


def names() -> tuple[str, ...]:
    """Return the names of the built-in tasks."""
    return tuple(sorted(name for name in read_tasks() if name != SHARED))


@cache
def read_tasks() -> Mapping[str, Any]:
    """Return the tables of `tasks.toml`."""
    return tomllib.loads(Path(__file__).with_name("tasks.toml").read_text())


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages that are tasks, by the task's name."""
    return {each.name: each for each in entry_points(group=ENTRY_POINT_GROUP)}
