"""Translation of a command of this machine into the same command on a cluster's head."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from orchestrator.cluster.remote.source_digest import PROJECT_ROOT, SOURCE_FOLDERS
from orchestrator.study.config_file import UNSAVED
from orchestrator.study.option_words import given_values, option_flag, option_words
from orchestrator.study.options import StudyOptions
from orchestrator.study.program_names import script_name
from orchestrator.util.errors import UsageError
from orchestrator.util.graceful_interrupts import INSTALLED_PROGRAM
from orchestrator.util.redaction import redact_secrets
from variants import catalogue
from variants.variant_names import FILE_SUFFIX

LOCAL_OPTIONS = (*UNSAVED, "output")
"""Options that concern this machine only."""


def remote_command(options: StudyOptions) -> list[str]:
    """Return the arguments of `python` on the head: the script, relative to the project, and its options.

    `lora-orchestrator`, which need not be installed there, becomes `-m orchestrator`.

    Raises:
        UsageError: The script, or a file that an option names, does not exist on the head.
    """
    script = Path(sys.argv[0]).resolve()
    if _is_program(script):
        program = ["-m", "orchestrator", sys.argv[1]]
    elif _is_source(script):
        program = [script.relative_to(PROJECT_ROOT).as_posix()]
    else:
        folder = PROJECT_ROOT / "experiments"
        raise UsageError(f"--on {options.on}: {script} is not sent to a cluster; move it into {folder}.")
    return [*program, *build_arguments(options)]


def build_arguments(options: StudyOptions) -> list[str]:
    """Return the options that differ from their defaults, in one spelling however they were typed.

    Raises:
        UsageError: An option names a file of this machine, or holds a password.
    """
    _check_options(options)
    given = given_values(options, catalogue.names())
    values = {name: value for name, value in given.items() if name not in LOCAL_OPTIONS}
    for name, value in values.items():
        if isinstance(value, tuple):
            values[name] = tuple(_remote_word(name, option_flag(name), word) for word in value)
    return option_words(values)


def _check_options(options: StudyOptions) -> None:
    """Raise UsageError for files of this machine, and for passwords, which a job's command would show."""
    context = f"with --on {options.on}"
    if options.store is not None:
        raise UsageError(f"--store {str(options.store)!r} {context}: the cluster has its own; leave it out.")
    uri = options.tracking_uri or ""
    if uri.startswith("sqlite:"):
        raise UsageError(f"--tracking-uri {uri!r} {context}: the head has an MLflow server; leave it out.")
    if redact_secrets(uri) != uri:
        raise UsageError(
            f"--tracking-uri {redact_secrets(uri)!r} {context}: a job's command shows its password; export "
            "MLFLOW_TRACKING_URI in the head's ~/.lora_env and leave it out."
        )
    for name in ("data", "validation_data", "test_data"):
        value = getattr(options, name) or ()
        for source in (value,) if isinstance(value, str) else value:
            if Path(source).exists():
                copy = f"ray rsync-up {options.on} {source} /shared/data/{Path(source).name}"
                raise UsageError(
                    f"{option_flag(name)} {source!r} {context}: is on this machine, and the head does not "
                    f"see it; copy it ({copy}) and give the copy."
                )
    if options.model is not None and Path(options.model).is_dir():
        raise UsageError(
            f"--model {options.model!r} {context}: a folder of this machine, which the head does not see; "
            f"copy it (ray rsync-up {options.on} {options.model}/ /shared/models/NAME/) and give the copy."
        )


def _is_program(script: Path) -> bool:
    """Return whether a script is `lora-orchestrator` or `python -m orchestrator`."""
    return script.stem == INSTALLED_PROGRAM or script == PROJECT_ROOT / "orchestrator" / "__main__.py"


def _is_source(file: Path) -> bool:
    return any(file.is_relative_to(PROJECT_ROOT / folder) for folder in SOURCE_FOLDERS)


def _remote_word(field: str, option: str, word: object) -> str:
    """Return a word of an option with the paths of tasks and variants relative to the project.

    In the words of --set, --space and --factors, VARIANT.NAME may stand before the first "=".
    """
    text = str(word)
    if field in ("task", "variants"):
        return _project_path(option, text)
    if field in ("set", "space", "factors"):
        key, equals, value = text.partition("=")
        variant, dot, name = key.rpartition(".")
        return f"{_project_path(option, variant)}{dot}{name}{equals}{value}"
    return text


def _project_path(option: str, name: str) -> str:
    """Return the file of a task or variant as a path in the project; another name as it is."""
    file = Path(name)
    if not name.endswith(FILE_SUFFIX) or not file.is_file():
        return name
    if not _is_source(file.resolve()):
        raise UsageError(
            f"{option} {name!r}: a file of this machine, which the head does not see; move it into "
            f"{PROJECT_ROOT / 'experiments'}, which `ray up` sends there."
        )
    return file.resolve().relative_to(PROJECT_ROOT).as_posix()


def study_key(options: StudyOptions) -> str:
    """Return the script with --study, or with the options of which the study's default name consists."""
    path = Path(sys.argv[0])
    script = script_name(sys.argv[1]) if _is_program(path.resolve()) else path.stem
    if options.study:
        return f"{script}-{options.study}"
    tasks = (options.preset,) if options.preset else options.data or options.task or ()
    parts = [script, *tasks, options.model, "dry-run" if options.dry_run else None]
    parts += [options.search_method] if options.search != "grid" else []
    return "-".join(filter(None, parts))


def study_job_id(options: StudyOptions) -> str:
    """Return the name of the study's Ray job: its key in ASCII, shortened, and a hash of the whole key."""
    key = study_key(options)
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', key)[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
