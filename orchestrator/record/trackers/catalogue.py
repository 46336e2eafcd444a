"""The trackers that `--tracker` names: files NAME_tracker.py of this package, and entry points of others."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import orchestrator.record.trackers
from orchestrator.record.trackers.tracker import Tracker
from orchestrator.util.errors import UsageError, format_error, suggest_nearest

NONE = "none"
"""The value of --tracker for MLflow alone."""
ENTRY_POINT_GROUP = "lora_orchestrator.trackers"
"""Group of the entry points that a package registers its trackers under: NAME = "module:Class"."""
_SUFFIX = "_tracker"


def names() -> list[str]:
    """Return the names of all trackers beside MLflow."""
    modules = pkgutil.iter_modules(orchestrator.record.trackers.__path__)
    own = {m.name.removesuffix(_SUFFIX) for m in modules if m.name.endswith(_SUFFIX)}
    return sorted(own | _entry_points().keys())


def load_trackers(chosen: Sequence[str]) -> dict[str, type[Tracker]]:
    """Find and check the trackers that a command names.

    Args:
        chosen: The names; "none" for none.

    Returns:
        Name -> class of the tracker.

    Raises:
        UsageError: A name is unknown, a tracker's package is not installed or has no tracker, or a setting is
            missing.
    """
    found = {}
    for name in dict.fromkeys(chosen):
        if name == NONE:
            if len(chosen) > 1:
                raise UsageError(f"--tracker {' '.join(chosen)}: `none` stands alone; take it away.")
            continue
        if name == "mlflow":
            raise UsageError("--tracker mlflow: MLflow is always written; leave it out.")
        if name not in names():
            raise UsageError(f"--tracker {name!r} is not one. {suggest_nearest(name, [NONE, *names()])}")
        found[name] = _load(name)
        found[name].check()
    return found


def _load(name: str) -> type[Tracker]:
    """Return the class of a tracker: the entry point's, or `TRACKER` of the module in this package."""
    if name in _entry_points():
        return _load_entry_point(name)
    module = importlib.import_module(f"{__package__}.{name}{_SUFFIX}")
    own: type[Tracker] = module.TRACKER
    return own


def _load_entry_point(name: str) -> type[Tracker]:
    entry = _entry_points()[name]
    try:
        loaded = entry.load()
    except Exception as error:
        raise UsageError(
            f"--tracker {name}: {entry.value} cannot be loaded ({format_error(error)}); repair its package "
            "or leave the tracker out."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Tracker)):
        raise UsageError(
            f"--tracker {name}: {entry.value} is no subclass of "
            "orchestrator.record.trackers.tracker.Tracker; repair its package or leave the tracker out."
        )
    return loaded


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=ENTRY_POINT_GROUP)}
