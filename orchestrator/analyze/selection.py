"""A choice that a study has made, kept beside it: what comes after builds on it, so a second run must not
silently choose otherwise.

<output>/<study>/choice.json
{"configurations": [fingerprint, ...]: those it was chosen among, ...: what the script keeps}
A script's own kind of choice is a dataclass that adds its fields to `Choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.record.study_file import StudyFile
from orchestrator.study.options import StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import BadInput

FILE = "choice.json"


@dataclass(frozen=True)
class Choice:
    configurations: tuple[str, ...]
    """Fingerprints of all that it was chosen among."""


Kind = TypeVar("Kind", bound=Choice)


def study_name(script: str, options: StudyOptions, default_task: str) -> str:
    """Of a script with two stages: --study, or made of script, task and model; the stages add an ending."""
    parts = [script, Path(options.task or default_task).stem]
    parts += [Path(options.model).name] if options.model else []
    return options.study or "-".join(parts).replace("@", "-")


def read(folder: Path, kind: type[Kind]) -> Kind | None:
    """None where nothing has been chosen yet. Raises BadInput on a file that is no choice of this kind."""
    return atomic_files.read(folder / FILE, kind, "a choice", "delete it and run the study's command again")


def keep(folder: Path, kind: type[Kind], found: Callable[[], Kind]) -> Kind:
    """The choice that was kept; the first time, what `found` says now, which is kept then."""
    if read(folder, kind) is None:
        from pydantic import TypeAdapter

        atomic_files.replace(
            folder / FILE, atomic_files.seal(TypeAdapter(kind).dump_json(found(), indent=1).decode())
        )
    kept = read(folder, kind)
    assert kept is not None
    return kept


def refuse_another(folder: Path, name: str, wanted: Iterable[str], who: str, why: str) -> bool:
    """Raises BadInput where the study `name` has chosen and `wanted` (fingerprints) would make it choose
    among others; says whether it has chosen. `who` chooses; `why` says what is wrong about it and what to
    do instead."""
    kept = read(folder, Choice)
    if kept is None:
        return False
    study = StudyFile.read(folder) or StudyFile(name, "", "")
    now = set(study.extended(wanted, ()).configurations)
    if set(kept.configurations) != now:
        raise BadInput(
            f"--study {name!r}: {who} has chosen among {len(kept.configurations)} configurations and now "
            f"there would be {len(now)}{why}."
        )
    return True
