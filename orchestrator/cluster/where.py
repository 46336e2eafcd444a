"""Where a command runs: here, or on a cluster that is up."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.study.errors import BadInput
from orchestrator.study.options import CLUSTER_FILE, HERE, StudyOptions

MOMENT_SECONDS = 3.0
"""What looking for a cluster may take that nobody has named."""


def elsewhere(options: StudyOptions) -> int | None:
    """The exit code of the command on a cluster; None when it is to run here. Raises BadInput."""
    if options.on == HERE:
        return None
    path = Path(options.on or CLUSTER_FILE)
    if options.on is None and not _wanted(path):
        return None
    from orchestrator.cluster.on import run

    return run(options, path)


def _wanted(path: Path) -> bool:
    """Whether the user wants the cluster that is up and was not named. Raises BadInput where nobody can be
    asked."""
    from orchestrator.schedule import cluster

    if cluster.address() is not None:
        return False  # as on a cluster's head: the study joins
    import yaml

    try:
        name = yaml.safe_load(path.read_text())["cluster_name"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    from orchestrator.cluster import head

    address, why = head.find(path, MOMENT_SECONDS)
    if address is None:
        if why.startswith("no answer in"):
            print(f"{path}: {why} whether cluster {name} is up; this runs here", file=sys.stderr)
        return False
    if not sys.stdin.isatty():
        raise BadInput(f"cluster {name} is up ({path}); say where to run: --on {path}, or --on {HERE}.")
    said = input(f"cluster {name} is up: run there? [Y/n] ").strip().lower()
    return said in ("", "y", "yes")
