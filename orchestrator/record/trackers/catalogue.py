"""The trackers that `--tracker` names: files NAME_tracker.py of this package, and entry points of others."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

import orchestrator.record.trackers
from orchestrator.record.trackers.tracker import Tracker
from orchestrator.util.errors import UsageError, format_error, suggest_nearest

NONE = "none"
"""The value of --tracker for MLflow alone."""
ENTRY_POINT_GROUP = "lora_orchestrator.trackers"
"""Group of the entry points that a package registers its trackers under: NAME = "module:Class"."""
_SUFFIX = "_tracker"


def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return where each tracker beside MLflow is found, by its name."""
    modules = [each.name for each in pkgutil.iter_modules(orchestrator.record.trackers.__path__)]
    own = [
        EntryPoint(module.removesuffix(_SUFFIX), f"{__package__}.{module}:TRACKER", ENTRY_POINT_GROUP)
        for module in modules
        if module.endswith(_SUFFIX)
    ]
    return {each.name: each for each in [*own, *entry_points(group=ENTRY_POINT_GROUP)]}


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
    chosen = list(dict.fromkeys(chosen))
    if chosen == [NONE]:
        return {}
    if NONE in chosen:
        raise UsageError(f"--tracker {' '.join(chosen)}: `none` stands alone; take it away.")
    if "mlflow" in chosen:
        raise UsageError("--tracker mlflow: MLflow is always written; leave it out.")
    known = entry_points_by_name()
    found = {}
    for name in chosen:
        if name not in known:
            raise UsageError(f"--tracker {name!r} is not one. {suggest_nearest(name, [NONE, *known])}")
        found[name] = _load(known[name])
        found[name].check()
    return found


def _load(entry: EntryPoint) -> type[Tracker]:
    """Return the class of a tracker."""
    try:
        loaded = entry.load()
    except Exception as error:
        raise UsageError(
            f"--tracker {entry.name}: {entry.value} cannot be loaded ({format_error(error)}); repair its "
            "package or leave the tracker out."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Tracker)):
        raise UsageError(
            f"--tracker {entry.name}: {entry.value} is no subclass of "
            "orchestrator.record.trackers.tracker.Tracker; repair its package or leave the tracker out."
        )
    return loaded
