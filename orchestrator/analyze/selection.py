"""The choice of a study: values that it has chosen from its results, such as the best learning rates.

The choice is kept as `choice.json` in the study's folder. Later training changes the records that it was made
from, so a repeated command reads the file instead of choosing again. A script defines its own kind of choice,
a dataclass that adds fields to `Choice`. The file holds the dataclass as JSON:
{"configurations": [fingerprint, ...], ...}.
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
    """The base class of what a study has chosen. A subclass adds the chosen values."""

    configurations: tuple[str, ...]
    """The fingerprints of all configurations that the choice was made among."""


ChoiceT = TypeVar("ChoiceT", bound=Choice)


def read_choice(folder: Path, choice_type: type[ChoiceT]) -> ChoiceT | None:
    """Read the choice of a study.

    Args:
        folder: The study's folder.
        choice_type: The kind of choice.

    Returns:
        The choice, or None if the study has made none.

    Raises:
        UsageError: The file is damaged, or holds another kind of choice.
    """
    fix = "delete it and run the study's command again"
    return atomic_files.read_json(folder / FILE, choice_type, "a choice", fix)


def load_or_make_choice(
    folder: Path, choice_type: type[ChoiceT], make_choice: Callable[[], ChoiceT]
) -> ChoiceT:
    """Read the choice of a study; if the study has made none, make the choice and write it.

    Args:
        folder: The study's folder.
        choice_type: The kind of choice.
        make_choice: Function that returns the choice. It is called only if there is no file.

    Returns:
        The choice, read back from the file.

    Raises:
        UsageError: The file is damaged, or holds another kind of choice.
    """
    if read_choice(folder, choice_type) is None:
        from pydantic import TypeAdapter

        text = TypeAdapter(choice_type).dump_json(make_choice(), indent=1, by_alias=True).decode()
        atomic_files.write_atomically(folder / FILE, atomic_files.add_checksum(text))
    saved = read_choice(folder, choice_type)
    assert saved is not None
    return saved


def check_same_candidates(
    folder: Path, study_name: str, fingerprints: Iterable[str], selector: str, explanation: str
) -> bool:
    """Check that the command does not extend a study that has already made its choice.

    Args:
        folder: The study's folder.
        study_name: The study's name.
        fingerprints: The configurations of the command.
        selector: The stage that has made the choice, for the error message.
        explanation: The end of the error message: the reason for the refusal, and the remedy.

    Returns:
        Whether the study has made its choice.

    Raises:
        UsageError: The choice was made among other configurations, or a file of the study is damaged.
    """
    saved = read_choice(folder, Choice)
    if saved is None:
        return False
    study = StudyFile.read(folder) or StudyFile(study_name, "", "")
    now = set(study.with_configurations(fingerprints, ()).configurations)
    if set(saved.configurations) != now:
        chosen = f"{selector} has chosen among {len(saved.configurations)} configurations"
        raise UsageError(f"--study {study_name!r}: {chosen} and now there would be {len(now)}{explanation}.")
    return True
