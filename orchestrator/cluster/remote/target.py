"""Where a command runs: here, or on a cluster that is up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from orchestrator.study.options import CLUSTER_FILE, LOCAL, StudyOptions
from orchestrator.util.errors import UsageError

LOOKUP_TIMEOUT_SECONDS = 3.0
"""What looking for a cluster may take that nobody has named."""


def run_if_remote(options: StudyOptions) -> int | None:
    """The exit code of the command on a cluster; None when it is to run here. Raises BadInput."""
    if options.on == LOCAL:
        return None
    path = Path(options.on or CLUSTER_FILE)
    if options.on is None and not _user_selects_cluster(path):
        return None
    from orchestrator.cluster.remote.submit import run_on_cluster

    return run_on_cluster(options, path)


def _user_selects_cluster(path: Path) -> bool:
    """Whether the user wants the cluster that is up and was not named. Raises BadInput where nobody can be
    asked.
    """
    from orchestrator.execution.ray import runtime

    if runtime.running_cluster_address() is not None:
        return False  # as on a cluster's head: the study joins
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
        name = config["cluster_name"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    if _lacks_ssh_key(config):
        return False
    from orchestrator.cluster.remote import head

    address, reason = head.find_head(path, LOOKUP_TIMEOUT_SECONDS)
    timed_out = reason.startswith(head.TIMEOUT_PREFIX)
    is_interactive = sys.stdin.isatty()
    if address is None and not (timed_out and is_interactive):
        if timed_out:
            print(f"{path}: {reason} whether cluster {name} is up; this runs here", file=sys.stderr)
        return False
    if not is_interactive:
        raise UsageError(f"cluster {name} is up ({path}); say where to run: --on {path}, or --on {LOCAL}.")
    if timed_out:
        return _ask_yes_no(f"cluster {name} may be up ({reason}): run there? [y/N] ", False)
    return _ask_yes_no(f"cluster {name} is up: run there? [Y/n] ", True)


def _lacks_ssh_key(config: dict[str, Any]) -> bool:
    """Whether this machine cannot have started it: Ray's key to AWS's machines is not here. To ask AWS would
    take seconds.
    """
    provider, auth = config.get("provider") or {}, config.get("auth") or {}
    if provider.get("type") != "aws" or provider.get("key_pair") or auth.get("ssh_private_key"):
        return False
    return not list(Path("~/.ssh").expanduser().glob("ray-autoscaler*.pem"))


def _ask_yes_no(question: str, default: bool) -> bool:
    """The answer; without a clear one the usual."""
    answer = input(question).strip().lower()
    return default if not answer else answer in ("y", "yes")
