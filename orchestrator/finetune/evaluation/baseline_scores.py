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

from orchestrator.finetune.data.dataset_cache import task_file_digest
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files
from orchestrator.util.canonical_json import canonical_json

Scores = Mapping[str, Mapping[str, float]]


def load_or_compute_scores(
    folder: Path,
    configuration: Configuration,
    task: Task,
    process_group: ProcessGroup,
    compute: Callable[[], Scores],
) -> Scores:
    """What is kept, or what `compute` gives on all of the team, which rank 0 keeps."""
    key = _key(configuration, task)
    file = folder / f"{Path(task.name).stem}-{key}.untrained.json"

    def read_cached() -> Scores | None:
        # Not there, damaged, another's, or of an earlier version, which did not say whose it is: found anew.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(atomic_files.verify_checksum(file.read_bytes()))
            return kept["scores"] if kept["key"] == key else None
        return None

    cached = process_group.broadcast_from_rank0(read_cached)
    if cached is not None:
        return cached
    computed = compute()
    contents = {"key": key, "scores": {split: dict(split_scores) for split, split_scores in computed.items()}}
    sealed = atomic_files.add_checksum(json.dumps(contents))
    process_group.run_on_all(
        lambda: atomic_files.write_atomically(file, sealed) if process_group.rank == 0 else None
    )
    return computed


def _key(configuration: Configuration, task: Task) -> str:
    key_fields = {
        "task": asdict(replace(configuration.task, name=Path(task.name).stem)),
        "file": task_file_digest(task),
        "model": [configuration.model.content, configuration.model.dtype],
        "length": configuration.batches.max_length,
        "loop": configuration.loop_numerics,
    }
    return hashlib.sha256(canonical_json(key_fields)).hexdigest()[:16]
