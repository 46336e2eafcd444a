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
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

FILE = "choice.json"


@dataclass(frozen=True)
class Choice:
    configurations: tuple[str, ...]
    """Fingerprints of all that it was chosen among."""


ChoiceT = TypeVar("ChoiceT", bound=Choice)


def read_choice(folder: Path, choice_type: type[ChoiceT]) -> ChoiceT | None:
    """None where nothing has been chosen yet. Raises BadInput on a file that is no choice of this kind."""
    return atomic_files.read_json(
        folder / FILE, choice_type, "a choice", "delete it and run the study's command again"
    )


def load_or_make_choice(
    folder: Path, choice_type: type[ChoiceT], make_choice: Callable[[], ChoiceT]
) -> ChoiceT:
    """The choice that was kept; the first time, what `found` says now, which is kept then."""
    if read_choice(folder, choice_type) is None:
        from pydantic import TypeAdapter

        atomic_files.write_atomically(
            folder / FILE,
            atomic_files.add_checksum(TypeAdapter(choice_type).dump_json(make_choice(), indent=1).decode()),
        )
    saved = read_choice(folder, choice_type)
    assert saved is not None
    return saved


def check_same_candidates(
    folder: Path, study_name: str, fingerprints: Iterable[str], selector: str, explanation: str
) -> bool:
    """Raises BadInput where the study `name` has chosen and `wanted` (fingerprints) would make it choose
    among others; says whether it has chosen. `who` chooses; `why` says what is wrong about it and what to
    do instead."""
    saved = read_choice(folder, Choice)
    if saved is None:
        return False
    study = StudyFile.read(folder) or StudyFile(study_name, "", "")
    now = set(study.with_configurations(fingerprints, ()).configurations)
    if set(saved.configurations) != now:
        raise UsageError(
            f"--study {study_name!r}: {selector} has chosen among {len(saved.configurations)} configurations and now "
            f"there would be {len(now)}{explanation}."
        )
    return True
