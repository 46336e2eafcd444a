"""A command of this machine, as it is typed on a cluster's head."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from orchestrator.cluster.remote.source_digest import FOLDERS, ROOT
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import BadInput
from orchestrator.util.redaction import without_secrets

NOT_THERE = ("on", "stop", "output")
"""Options that are about this machine."""


def command(options: StudyOptions) -> list[str]:
    """Script and options, relative to the project's folder. Raises BadInput for what the head cannot have."""
    script = Path(sys.argv[0]).resolve()
    if script == ROOT / "orchestrator" / "__main__.py":
        start = ["-m", "orchestrator", sys.argv[1]]
    elif any(script.is_relative_to(ROOT / folder) for folder in FOLDERS):
        start = [script.relative_to(ROOT).as_posix()]
    else:
        raise BadInput(
            f"--on {options.on}: {script} is not sent to a cluster; put it into {ROOT / 'experiments'}."
        )
    return [*start, *arguments(options)]


def arguments(options: StudyOptions) -> list[str]:
    """What differs from the defaults: the same for every spelling."""
    _check(options)
    words: list[str] = []
    for each in fields(options):
        value, flag = getattr(options, each.name), each.name.replace("_", "-")
        if each.name in NOT_THERE or value == _default(each):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", _task(value) if each.name == "task" else str(value)]
    return words


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _check(options: StudyOptions) -> None:
    """Raises BadInput for files of this machine, and for secrets: a job's command can be read by everybody
    there."""
    where = f"with --on {options.on}"
    if options.store is not None:
        raise BadInput(
            f"--store {str(options.store)!r} {where}: the cluster has its own, on its storage; leave it out."
        )
    uri = options.tracking_uri or ""
    if uri.startswith("sqlite:"):
        raise BadInput(f"--tracking-uri {uri!r} {where}: the head has an MLflow server; leave it out.")
    if without_secrets(uri) != uri:
        raise BadInput(
            f"--tracking-uri {without_secrets(uri)!r} {where}: a job's command shows its password; export "
            "MLFLOW_TRACKING_URI in the head's ~/.lora_env and leave it out."
        )
    if options.model is not None and Path(options.model).is_dir():
        raise BadInput(
            f"--model {options.model!r} {where}: a folder of this machine, which the head does not see; "
            f"copy it (ray rsync-up {options.on} {options.model}/ /shared/models/NAME/) and name that."
        )
    if options.task is not None and Path(options.task).is_file():
        _task(options.task)


def _task(task: str) -> str:
    """A file of the project is on the head, too."""
    file = Path(task)
    if not file.is_file():
        return task
    if not any(file.resolve().is_relative_to(ROOT / folder) for folder in FOLDERS):
        raise BadInput(
            f"--task {task!r}: a file of this machine, which the head does not see; put it into "
            f"{ROOT / 'experiments'}, which `ray up` sends there."
        )
    return file.resolve().relative_to(ROOT).as_posix()


def study(options: StudyOptions) -> str:
    """What tells studies apart on a cluster: script and --study, or what its name is made of."""
    script = Path(sys.argv[0]).stem
    made = [options.task, options.model, "dry-run" if options.dry_run else None]
    made += [options.method] if options.search != "grid" else []
    return "-".join([script, options.study] if options.study else [script, *(each for each in made if each)])
