"""The base's own scores, found once a store: where answers are generated and graded that takes minutes, and
every seat would begin with it.

    <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json      split -> score -> number
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from orchestrator.finetune.prepared import content_of_file
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.team import Team
from orchestrator.record import files
from orchestrator.study.configuration import Configuration, canonical

Scores = Mapping[str, Mapping[str, float]]


def scores(
    folder: Path, configuration: Configuration, task: Task, team: Team, compute: Callable[[], Scores]
) -> Scores:
    """What is kept, or what `compute` gives on all of the team, which rank 0 keeps."""
    place = folder / f"{Path(task.name).stem}-{_key(configuration, task)}.untrained.json"

    def look() -> Scores | None:
        with suppress(OSError, ValueError):  # not there, or damaged: found anew
            return json.loads(files.unseal(place.read_bytes()))
        return None

    kept = team.agree(look)
    if kept is not None:
        return kept
    found = compute()
    sealed = files.seal(json.dumps({split: dict(of) for split, of in found.items()}))
    team.attempt(lambda: files.replace(place, sealed) if team.rank == 0 else None)
    return found


def _key(configuration: Configuration, task: Task) -> str:
    about = {
        "task": asdict(replace(configuration.task, name=Path(task.name).stem)),
        "file": content_of_file(task),
        "model": [configuration.model.content, configuration.model.dtype],
        "length": configuration.batches.max_length,
        "loop": configuration.loop_numerics,
    }
    return hashlib.sha256(canonical(about)).hexdigest()[:16]
