"""The scores of a base model before training, computed once per store.

They are equal for all lanes on one model and task. A lane needs only the loss to start. The scores of
generated answers take minutes: the first trainer that needs them generates the answers under a lock, and the
others train meanwhile. A trainer waits for them only when it writes the record of a finished lane before they
are in the store.

    <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json
        {"key": the hash in the file name, "scores": {split: {score: number}}}
    <folder>/letters-3f9c0a1b2c3d4e5f.untrained-loss.json      the same, without scores of generated answers
    <folder>/.letters-3f9c0a1b2c3d4e5f.untrained.lock          held by the trainer that generates the answers
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.finetune.process_group import ProcessGroup, WorkerError, result_or_error
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files, timeouts
from orchestrator.util.atomic_files import canonical_json

Scores = Mapping[str, Mapping[str, float]]
"""The scores of each split, by name."""


class _Missing(Enum):
    """The reason why scores could not be read from the store."""

    OWN = "this trainer computes them and holds the lock"
    OTHERS = "another trainer computes them"


@dataclass
class BaselineScores:
    """The scores of one base model on one task. All processes of a trainer call the methods together.

    Args:
        folder: The cache folder.
        name: The first part of the file names.
        key: The hash of all that decides the scores.
        process_group: The processes of the trainer. Rank 0 reads and writes the files.
    """

    folder: Path
    name: str
    key: str
    process_group: ProcessGroup
    scores: Scores = field(default_factory=dict)
    """The known scores. They have at least the validation loss once `load_or_compute_loss` has returned."""
    is_complete: bool = False
    """True if the scores of generated answers are known, too, or the task has none."""

    @classmethod
    def of(
        cls, folder: Path, configuration: Configuration, task: Task, process_group: ProcessGroup
    ) -> BaselineScores:
        """Return the scores of a configuration's base model and task, with nothing known yet.

        Args:
            folder: The cache folder.
            configuration: The configuration, which names the model and the data.
            task: The configuration's task.
            process_group: The processes of the trainer.
        """
        name = configuration.task.content or configuration.task.name
        return cls(folder, name, _cache_key_hash(configuration), process_group)

    def load_or_compute_loss(self, compute: Callable[[], Scores], has_answers: bool) -> None:
        """Read the scores that need no generated answers, or compute and store them.

        Args:
            compute: Computes them in all processes of the trainer; called if they are not stored.
            has_answers: Whether the task has further scores, of generated answers.
        """
        stored = self.process_group.broadcast_from_rank0(
            lambda: (self._read("untrained"), self._read("untrained-loss"))
        )
        self.is_complete = stored[0] is not None or not has_answers
        found = stored[0] or (stored[1] if has_answers else None)
        self.scores = found or self._store("untrained-loss" if has_answers else "untrained", compute())

    def load_or_compute_all(
        self, compute: Callable[[], Scores], wait: bool = True, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Read all scores, or compute and store them, unless another trainer does so.

        Args:
            compute: Computes them in all processes of the trainer; called if they are not stored and no other
                trainer computes them.
            wait: Whether to wait for a trainer that computes them; if it dies, this one takes over.
            on_wait: Called again and again during such a wait.
        """
        lock = FileLock(self.folder / f".{self.name}-{self.key}.untrained.lock", timeout=0)
        while not self.is_complete:
            own = result_or_error(lambda: self._read_or_lock(lock)) if self.process_group.rank == 0 else None
            # This call is made inside `run_on_all`: an error of rank 0 must be raised on all ranks alike.
            found = self.process_group.all_gather(own)[0]
            assert found is not None, "rank 0 has read the scores"
            if isinstance(found, WorkerError):  # a group of one process does not raise what it gathers
                raise found
            if found is _Missing.OTHERS:
                if not wait:
                    return
                on_wait()
                time.sleep(timeouts.BASELINE_POLL_SECONDS)
                continue
            try:
                self.scores = self._store("untrained", compute()) if found is _Missing.OWN else found
                self.is_complete = True
            finally:
                lock.release()

    def _read_or_lock(self, lock: FileLock) -> Scores | _Missing:
        """Return the stored scores; else try to take the lock. Rank 0 only."""
        if (found := self._read("untrained")) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            return _Missing.OTHERS
        # The trainer that held the lock before may have stored them.
        return self._read("untrained") or _Missing.OWN

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{self.key}.{kind}.json"

    def _read(self, kind: str) -> Scores | None:
        # A file that is absent, damaged, of another key or of a version without keys is computed again.
        with suppress(OSError, ValueError, KeyError, TypeError):
            contents = json.loads(atomic_files.verify_checksum(self._path(kind).read_bytes()))
            return contents["scores"] if contents["key"] == self.key else None
        return None

    def _store(self, kind: str, scores: Scores) -> Scores:
        """Write scores to their file on rank 0, and return them."""
        sealed = atomic_files.add_checksum(json.dumps({"key": self.key, "scores": scores}))
        path, is_writer = self._path(kind), self.process_group.rank == 0
        self.process_group.run_on_all(
            lambda: atomic_files.write_atomically(path, sealed) if is_writer else None
        )
        return scores


def _cache_key_hash(configuration: Configuration) -> str:
    """Return a hash of all that decides the scores."""
    choice = configuration.task
    key_fields: dict[str, Any] = {
        "task": asdict(replace(choice, name="" if choice.content else choice.name)),
        "model": [configuration.model.content, configuration.model.dtype],
        "length": configuration.batches.max_length,
        "loop": configuration.loop_numerics,
    }
    return hashlib.sha256(canonical_json(key_fields)).hexdigest()[:16]
