"""Where a command runs: here, or on a cluster that is up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from orchestrator.study.options import CLUSTER_FILE, HERE, StudyOptions
from orchestrator.util.errors import BadInput

MOMENT_SECONDS = 3.0
"""What looking for a cluster may take that nobody has named."""


def elsewhere(options: StudyOptions) -> int | None:
    """The exit code of the command on a cluster; None when it is to run here. Raises BadInput."""
    if options.on == HERE:
        return None
    path = Path(options.on or CLUSTER_FILE)
    if options.on is None and not _wanted(path):
        return None
    from orchestrator.cluster.remote.submit import run

    return run(options, path)


def _wanted(path: Path) -> bool:
    """Whether the user wants the cluster that is up and was not named. Raises BadInput where nobody can be
    asked."""
    from orchestrator.execution.ray import runtime

    if runtime.address() is not None:
        return False  # as on a cluster's head: the study joins
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
        name = config["cluster_name"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    if _never_from_here(config):
        return False
    from orchestrator.cluster.remote import head

    address, why = head.find(path, MOMENT_SECONDS)
    late = why.startswith(head.LATE)
    asked = sys.stdin.isatty()
    if address is None and not (late and asked):
        if late:
            print(f"{path}: {why} whether cluster {name} is up; this runs here", file=sys.stderr)
        return False
    if not asked:
        raise BadInput(f"cluster {name} is up ({path}); say where to run: --on {path}, or --on {HERE}.")
    if late:
        return _says(f"cluster {name} may be up ({why}): run there? [y/N] ", False)
    return _says(f"cluster {name} is up: run there? [Y/n] ", True)


def _never_from_here(config: dict[str, Any]) -> bool:
    """Whether this machine cannot have started it: Ray's key to AWS's machines is not here. To ask AWS would
    take seconds."""
    provider, auth = config.get("provider") or {}, config.get("auth") or {}
    if provider.get("type") != "aws" or provider.get("key_pair") or auth.get("ssh_private_key"):
        return False
    return not list(Path("~/.ssh").expanduser().glob("ray-autoscaler*.pem"))


def _says(question: str, usual: bool) -> bool:
    """The answer; without a clear one the usual."""
    said = input(question).strip().lower()
    return usual if not said else said in ("y", "yes")
