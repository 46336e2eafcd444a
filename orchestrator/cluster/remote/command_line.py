"""Translation of a command of this machine into the same command on a cluster's head."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from orchestrator.cluster.remote.source_digest import PROJECT_ROOT, SOURCE_FOLDERS
from orchestrator.cluster.remote.uploads import Uploads
from orchestrator.study.config_file import UNSAVED
from orchestrator.study.option_words import given_values, option_words
from orchestrator.study.options import StudyOptions
from orchestrator.study.program_names import script_name
from orchestrator.util.errors import UsageError
from orchestrator.util.graceful_interrupts import INSTALLED_PROGRAM
from orchestrator.util.redaction import redact_secrets
from variants import catalogue
from variants.variant_names import FILE_SUFFIX

LOCAL_OPTIONS = (*UNSAVED, "output")
"""Options that concern this machine only."""


def remote_command(options: StudyOptions, uploads: Uploads) -> list[str]:
    """Return the arguments of `python` on the head: the script, relative to the project, and its options.

    `lora-orchestrator`, which need not be installed there, becomes `-m orchestrator`.

    Args:
        options: The options of the command.
        uploads: Receives the files of this machine that the options name.

    Raises:
        UsageError: The script does not exist on the head, or an option cannot be used there.
    """
    script = Path(sys.argv[0]).resolve()
    if _is_program(script):
        names = [word for word in sys.argv[1:3] if not word.startswith("-")]  # `study`, or `check tuned`
        program = ["-m", "orchestrator", *(names if names[0] == "check" else names[:1])]
    elif _is_source(script):
        program = [script.relative_to(PROJECT_ROOT).as_posix()]
    else:
        folder = PROJECT_ROOT / "experiments"
        raise UsageError(f"--on {options.on}: {script} is not sent to a cluster; move it into {folder}.")
    return [*program, *build_arguments(options, uploads)]


def build_arguments(options: StudyOptions, uploads: Uploads) -> list[str]:
    """Return the options that differ from their defaults, in one spelling however they were typed.

    Args:
        options: The options of the command.
        uploads: Receives the files of this machine that the options name.

    Raises:
        UsageError: An option names a file that cannot be read, or holds a password.
    """
    _check_options(options)
    given = given_values(options, catalogue.names())
    values = {name: value for name, value in given.items() if name not in LOCAL_OPTIONS}
    for name, value in values.items():
        if isinstance(value, tuple):
            values[name] = tuple(_remote_word(name, word, uploads) for word in value)
        elif isinstance(value, str):
            values[name] = _remote_word(name, value, uploads)
    return option_words(values)


def _check_options(options: StudyOptions) -> None:
    """Raise UsageError for a store of this machine, and for passwords, which a job's command would show."""
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


def _is_program(script: Path) -> bool:
    """Return whether a script is `lora-orchestrator` or `python -m orchestrator`."""
    return script.stem == INSTALLED_PROGRAM or script == PROJECT_ROOT / "orchestrator" / "__main__.py"


def _is_source(file: Path) -> bool:
    return any(file.is_relative_to(PROJECT_ROOT / folder) for folder in SOURCE_FOLDERS)


def _remote_word(field: str, word: object, uploads: Uploads) -> str:
    """Return a word of an option with the head's paths in place of this machine's.

    In the words of --set, --space and --factors, VARIANT.NAME may stand before the first "=".
    """
    text = str(word)
    if field in ("data", "validation_data", "test_data", "model", "task", "variants"):
        return _remote_path(text, uploads, needs_suffix=field in ("task", "variants"))
    if field in ("set", "space", "factors"):
        key, equals, value = text.partition("=")
        variant, dot, name = key.rpartition(".")
        return f"{_remote_path(variant, uploads, needs_suffix=True)}{dot}{name}{equals}{value}"
    return text


def _remote_path(name: str, uploads: Uploads, *, needs_suffix: bool) -> str:
    """Return the head's path of a file or folder of this machine, or the name of something else as it is.

    Args:
        name: A word of an option.
        uploads: Receives the file, unless it belongs to the project's sources, which the head has.
        needs_suffix: Whether only a .py file is meant, as for tasks and variants.
    """
    path = Path(name)
    is_meant = name.endswith(FILE_SUFFIX) and path.is_file() if needs_suffix else os.path.exists(name)
    if not is_meant:
        return name
    if _is_source(path.resolve()):
        return path.resolve().relative_to(PROJECT_ROOT).as_posix()
    return uploads.add(path)


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
