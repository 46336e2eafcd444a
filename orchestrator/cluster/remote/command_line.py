"""A command of this machine, as it is typed on a cluster's head."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from orchestrator.cluster.remote.source_digest import PROJECT_ROOT, SOURCE_FOLDERS
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import redact_secrets

LOCAL_OPTIONS = ("on", "stop", "output")
"""Options that are about this machine."""


def remote_command(options: StudyOptions) -> list[str]:
    """Script and options, relative to the project's folder. Raises BadInput for what the head cannot have."""
    script = Path(sys.argv[0]).resolve()
    if script == PROJECT_ROOT / "orchestrator" / "__main__.py":
        start = ["-m", "orchestrator", sys.argv[1]]
    elif any(script.is_relative_to(PROJECT_ROOT / folder) for folder in SOURCE_FOLDERS):
        start = [script.relative_to(PROJECT_ROOT).as_posix()]
    else:
        raise UsageError(
            f"--on {options.on}: {script} is not sent to a cluster; put it into {PROJECT_ROOT / 'experiments'}."
        )
    return [*start, *build_arguments(options)]


def build_arguments(options: StudyOptions) -> list[str]:
    """What differs from the defaults: the same for every spelling."""
    _check_options(options)
    words: list[str] = []
    for each in fields(options):
        value, flag = getattr(options, each.name), each.name.replace("_", "-")
        if each.name in LOCAL_OPTIONS or value == _default_value(each):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", _project_path(value) if each.name == "task" else str(value)]
    return words


def _default_value(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _check_options(options: StudyOptions) -> None:
    """Raises BadInput for files of this machine, and for secrets: a job's command can be read by everybody
    there.
    """
    context = f"with --on {options.on}"
    if options.store is not None:
        raise UsageError(
            f"--store {str(options.store)!r} {context}: the cluster has its own, on its storage; leave it out."
        )
    uri = options.tracking_uri or ""
    if uri.startswith("sqlite:"):
        raise UsageError(f"--tracking-uri {uri!r} {context}: the head has an MLflow server; leave it out.")
    if redact_secrets(uri) != uri:
        raise UsageError(
            f"--tracking-uri {redact_secrets(uri)!r} {context}: a job's command shows its password; export "
            "MLFLOW_TRACKING_URI in the head's ~/.lora_env and leave it out."
        )
    if options.model is not None and Path(options.model).is_dir():
        raise UsageError(
            f"--model {options.model!r} {context}: a folder of this machine, which the head does not see; "
            f"copy it (ray rsync-up {options.on} {options.model}/ /shared/models/NAME/) and name that."
        )
    if options.task is not None and Path(options.task).is_file():
        _project_path(options.task)


def _project_path(task: str) -> str:
    """A file of the project is on the head, too."""
    file = Path(task)
    if not file.is_file():
        return task
    if not any(file.resolve().is_relative_to(PROJECT_ROOT / folder) for folder in SOURCE_FOLDERS):
        raise UsageError(
            f"--task {task!r}: a file of this machine, which the head does not see; put it into "
            f"{PROJECT_ROOT / 'experiments'}, which `ray up` sends there."
        )
    return file.resolve().relative_to(PROJECT_ROOT).as_posix()


def study_key(options: StudyOptions) -> str:
    """What tells studies apart on a cluster: script and --study, or what its name is made of."""
    script = Path(sys.argv[0]).stem
    made = [options.task, options.model, "dry-run" if options.dry_run else None]
    made += [options.search_method] if options.search != "grid" else []
    return "-".join([script, options.study] if options.study else [script, *(each for each in made if each)])
