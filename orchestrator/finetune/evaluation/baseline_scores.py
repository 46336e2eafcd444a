"""The scores of a base model before training, computed once per store.

They are equal for all lanes on one model and task. A lane needs only the loss to start. The scores of
generated answers take minutes: the first trainer that needs them generates the answers under a lock, and the
others train meanwhile. A trainer waits for them only when it writes the record of a finished lane before they
are in the store.

    <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json
        {split: {score: number}}; the file name has a hash of all that decides the scores
    <folder>/letters-3f9c0a1b2c3d4e5f.untrained-loss.json      the same, without scores of generated answers
    <folder>/.letters-3f9c0a1b2c3d4e5f.untrained.lock          held by the trainer that generates the answers
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files, timeouts

Scores = Mapping[str, Mapping[str, float]]
"""The scores of each split, by name."""


class BaselineScores:
    """The scores of a configuration's base model on its task, none of which are known at first.

    Args:
        folder: The cache folder.
        configuration: The configuration, which names the model and the data.
    """

    def __init__(self, folder: Path, configuration: Configuration) -> None:
        choice = configuration.task
        key_fields: dict[str, Any] = {
            "task": asdict(replace(choice, name="" if choice.content else choice.name)),
            "model": [configuration.model.content, configuration.model.dtype],
            "length": configuration.batches.max_length,
            "loop": configuration.loop_numerics,
        }
        self._folder = folder
        key = hashlib.sha256(atomic_files.canonical_json(key_fields)).hexdigest()[:16]
        self._stem = f"{choice.content or choice.name}-{key}.untrained"
        self.scores: Scores = {}
        """The known scores: at least the validation loss once `load_or_compute_loss` has returned."""
        self.is_complete = False
        """True if the scores of generated answers are known, too, or the task has none. On rank 0 only."""

    def load_or_compute_loss(
        self, compute: Callable[[], Scores], has_answers: bool, process_group: ProcessGroup
    ) -> None:
        """Read the scores that need no generated answers, or compute and store them.

        Args:
            compute: Computes them in all workers of the trainer; called if they are not stored.
            has_answers: Whether the task has further scores, of generated answers.
            process_group: The workers, all of which call this method. Rank 0 decides and stores.
        """
        kind = "-loss" if has_answers else ""
        all_scores, found = process_group.all_gather((self._read(""), self._read(kind)))[0]
        self.is_complete = all_scores is not None or not has_answers
        found = all_scores or found
        if found is None:
            found = compute()
            if process_group.rank == 0:
                self._store(kind, found)
        self.scores = found

    def load_or_compute_all(
        self, compute: Callable[[], Scores], wait: bool = True, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Read all scores, or compute and store them, unless another trainer does so. Rank 0 only.

        Args:
            compute: Computes them; called if they are not stored and no other trainer computes them.
            wait: Whether to wait for a trainer that computes them; if it dies, this one takes over.
            on_wait: Called again and again during such a wait.
        """
        while not self.is_complete:
            found = self._read("")
            if found is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self._folder / f".{self._stem}.lock", timeout=0)
                try:
                    with lock:
                        # The trainer that held the lock before may have stored them.
                        found = self._read("") or self._store("", compute())
                except Timeout:
                    if not wait:
                        return
                    on_wait()
                    time.sleep(timeouts.BASELINE_POLL_SECONDS)
                    continue
            self.scores, self.is_complete = found, True

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._stem}{kind}.json"

    def _read(self, kind: str) -> Scores | None:
        with suppress(OSError, ValueError):  # a file that is absent or damaged is computed again
            scores: Scores = json.loads(atomic_files.verify_checksum(self._path(kind).read_bytes()))
            return scores
        return None

    def _store(self, kind: str, scores: Scores) -> Scores:
        """Write scores to their file, and return them."""
        atomic_files.write_atomically(self._path(kind), atomic_files.add_checksum(json.dumps(scores)))
        return scores
