"""The names of tasks, without an import of any task: `--help` lists them."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

ENTRY_POINT_GROUP = "lora_orchestrator.tasks"
"""Group of the entry points that a package registers its tasks under: NAME = "module:Class"."""


def names() -> tuple[str, ...]:
    """Return the names of the built-in tasks."""
    return tuple(sorted(module_names()))


@lru_cache(maxsize=1)
def module_names() -> dict[str, str]:
    """Return the module name of each built-in task."""
    files = Path(__file__).parent.glob("*/*.py")
    return {p.stem: f"{__package__}.{p.parent.name}.{p.stem}" for p in files if p.stem != "__init__"}


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages that are tasks, by the task's name."""
    return {each.name: each for each in entry_points(group=ENTRY_POINT_GROUP)}
