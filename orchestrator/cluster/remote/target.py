"""Choice of the machine for a command: this one, or the head of a cluster that is up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from orchestrator.study.options import CLUSTER_FILE, LOCAL, StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError


def run_if_remote(options: StudyOptions) -> int | None:
    """Run the command on a cluster if the user wants it there.

    Returns:
        The exit code of the command on the cluster, or None if it is to run on this machine.

    Raises:
        UsageError: A cluster is up, the command does not say where to run, and there is no terminal to ask.
    """
    if options.on == LOCAL:
        return None
    path = Path(options.on or CLUSTER_FILE)
    if options.on is None and not _user_selects_cluster(path):
        return None
    from orchestrator.cluster.remote.submit import run_on_cluster

    return run_on_cluster(options, path)


def _user_selects_cluster(path: Path) -> bool:
    """Ask the user whether to run on the cluster of ./cluster.yaml, if it is up and was not named."""
    from orchestrator.execution.ray import runtime

    if runtime.running_cluster_address() is not None:
        return False  # the study joins the cluster that runs here, as on a cluster's head
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
        name = config["cluster_name"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    if _lacks_ssh_key(config):
        return False
    from orchestrator.cluster.remote import head

    is_interactive = sys.stdin.isatty()
    try:
        head.find_head(path, config, timeouts.CLUSTER_LOOKUP_SECONDS)
    except head.HeadNotFoundError:
        return False
    except head.HeadTimeoutError as error:
        if is_interactive:
            return _ask_yes_no(f"cluster {name} may be up ({error}): run there? [y/N] ", default=False)
        print(f"{path}: {error} whether cluster {name} is up; this runs here", file=sys.stderr)
        return False
    if not is_interactive:
        raise UsageError(f"cluster {name} is up ({path}); say where to run: --on {path}, or --on {LOCAL}.")
    return _ask_yes_no(f"cluster {name} is up: run there? [Y/n] ", default=True)


def _lacks_ssh_key(config: dict[str, Any]) -> bool:
    """Return whether this machine cannot have started the cluster: it lacks Ray's key to AWS's machines.

    The check avoids a request to AWS, which would take seconds.
    """
    provider, auth = config.get("provider") or {}, config.get("auth") or {}
    if provider.get("type") != "aws" or provider.get("key_pair") or auth.get("ssh_private_key"):
        return False
    return not list(Path("~/.ssh").expanduser().glob("ray-autoscaler*.pem"))


def _ask_yes_no(question: str, default: bool) -> bool:
    answer = input(question).strip().lower()
    return answer in ("y", "yes") if answer else default
