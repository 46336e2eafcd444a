"""The base's own scores, found once a store: where answers are generated and graded that takes minutes, and
every seat would begin with it.

    <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json
        {"key": as in the file's name, "scores": split -> score -> number}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from orchestrator.finetune.data.dataset_cache import content_of_file
from orchestrator.finetune.process_group import Team
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration, canonical
from orchestrator.util import atomic_files

Scores = Mapping[str, Mapping[str, float]]


def scores(
    folder: Path, configuration: Configuration, task: Task, team: Team, compute: Callable[[], Scores]
) -> Scores:
    """What is kept, or what `compute` gives on all of the team, which rank 0 keeps."""
    key = _key(configuration, task)
    place = folder / f"{Path(task.name).stem}-{key}.untrained.json"

    def look() -> Scores | None:
        # Not there, damaged, another's, or of an earlier version, which did not say whose it is: found anew.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(atomic_files.unseal(place.read_bytes()))
            return kept["scores"] if kept["key"] == key else None
        return None

    known = team.agree(look)
    if known is not None:
        return known
    found = compute()
    kept = {"key": key, "scores": {split: dict(of) for split, of in found.items()}}
    sealed = atomic_files.seal(json.dumps(kept))
    team.attempt(lambda: atomic_files.replace(place, sealed) if team.rank == 0 else None)
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
