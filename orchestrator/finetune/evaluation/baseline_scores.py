"""The scores of a base model before training, computed once per store.

They are equal for all lanes on one model and task. Without the cache every trainer would compute them at its
start, which takes minutes where answers are generated and graded.

    <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json
        {"key": the hash in the file name, "scores": {split: {score: number}}}
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
"""The scores of each split, by name."""


def load_or_compute_scores(
    folder: Path,
    configuration: Configuration,
    task: Task,
    process_group: ProcessGroup,
    compute: Callable[[], Scores],
) -> Scores:
    """Return the cached scores, or compute and cache them.

    Args:
        folder: The cache folder.
        configuration: The configuration, which names the model and the data.
        task: The configuration's task.
        process_group: The processes that call this function together. Rank 0 reads and writes the file.
        compute: Computes the scores in all processes of the group.

    Returns:
        The scores, equal in all processes.
    """
    key = _cache_key_hash(configuration, task)
    file = folder / f"{Path(task.name).stem}-{key}.untrained.json"

    def read_cached() -> Scores | None:
        # A file that is absent, damaged, of another key or of a version without keys is computed again.
        with suppress(OSError, ValueError, KeyError, TypeError):
            contents = json.loads(atomic_files.verify_checksum(file.read_bytes()))
            return contents["scores"] if contents["key"] == key else None
        return None

    cached = process_group.broadcast_from_rank0(read_cached)
    if cached is not None:
        return cached
    computed = compute()
    sealed = atomic_files.add_checksum(json.dumps({"key": key, "scores": computed}))
    process_group.run_on_all(
        lambda: atomic_files.write_atomically(file, sealed) if process_group.rank == 0 else None
    )
    return computed


def _cache_key_hash(configuration: Configuration, task: Task) -> str:
    """Return a hash of all that decides the scores."""
    key_fields = {
        "task": asdict(replace(configuration.task, name=Path(task.name).stem)),
        "file": task_file_digest(task),
        "model": [configuration.model.content, configuration.model.dtype],
        "length": configuration.batches.max_length,
        "loop": configuration.loop_numerics,
    }
    return hashlib.sha256(canonical_json(key_fields)).hexdigest()[:16]
