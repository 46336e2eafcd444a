"""A choice that a study has made, kept beside it: what comes after builds on it, so a second run must not
silently choose otherwise.

<output>/<study>/choice.json
{"configurations": [fingerprint, ...]: those it was chosen among, ...: what the script keeps}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.record import files
from orchestrator.record.study_file import StudyFile
from orchestrator.study.errors import BadInput
from orchestrator.study.options import StudyOptions

FILE = "choice.json"


def study_name(script: str, options: StudyOptions, default_task: str) -> str:
    """Of a script with two stages: --study, or made of script, task and model; the stages add an ending."""
    parts = [script, Path(options.task or default_task).stem]
    parts += [Path(options.model).name] if options.model else []
    return options.study or "-".join(parts).replace("@", "-")


def read(folder: Path) -> dict[str, Any] | None:
    """None where nothing has been chosen yet. Raises BadInput on a file that is no choice."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("configurations"), list):
        raise BadInput(f"{path}: not a choice; delete it and run the study's command again")
    return found


def keep(folder: Path, found: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The choice that was kept; the first time, what `found` says now, which is kept then."""
    if read(folder) is None:
        files.replace(folder / FILE, (json.dumps(found(), indent=1) + "\n").encode())
    kept = read(folder)
    assert kept is not None
    return kept


def refuse_another(folder: Path, name: str, wanted: Iterable[str], who: str, why: str) -> bool:
    """Raises BadInput where the study `name` has chosen and `wanted` (fingerprints) would make it choose
    among others; says whether it has chosen. `who` chooses; `why` says what is wrong about it and what to
    do instead."""
    kept = read(folder)
    if kept is None:
        return False
    study = StudyFile.read(folder) or StudyFile(name, "", "")
    now = set(study.extended(wanted, ()).configurations)
    if set(kept["configurations"]) != now:
        raise BadInput(
            f"--study {name!r}: {who} has chosen among {len(kept['configurations'])} configurations and now "
            f"there would be {len(now)}{why}."
        )
    return True
