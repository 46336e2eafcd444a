"""Scores of lanes in an evaluation harness, in files beside the records. `evaluate` can make them again.

`folder` is the store's folder `harness`.

store/harness/<fingerprint>/<task>.json                      a lane
             /base-<content>-<dtype>/<task>.json             a base model without a lane
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from orchestrator.study.configuration import ModelChoice
from orchestrator.util import atomic_files


@dataclass(frozen=True)
class HarnessScore:
    """One score of a task."""

    subtask: str
    """The task, or a part of it if it is a group or a tag."""
    metric: str
    """The harness's "METRIC,FILTER"."""
    score: float
    items: Sequence[float] = ()
    """The value of each item; empty for a group, and where the values are no numbers."""


@dataclass(frozen=True)
class HarnessResult:
    """The scores of a lane, or of its base model alone, in one task of a harness."""

    subject: str
    """The fingerprint of the lane, or `base_subject` of the base model."""
    task: str
    """The name of the task, group or tag that was asked for."""
    settings: str
    """What changes the scores, in words: "5 shots, 100 items"; empty for the task's own settings."""
    digest: str
    """A digest of what decides the scores, but for the subject."""
    scores: Sequence[HarnessScore]

    def whole(self) -> Sequence[HarnessScore]:
        """Return the scores of the whole task or group; for a tag, which has none, those of its tasks."""
        return [each for each in self.scores if each.subtask == self.task] or self.scores


def base_subject(model: ModelChoice) -> str:
    """Return the subject of a base model without a lane."""
    return f"base-{quote(model.content, safe='')[:40]}-{model.dtype}"


def write_result(folder: Path, result: HarnessResult) -> None:
    """Write a result to its file, which replaces an earlier result of this subject, task and settings."""
    name = ", ".join(filter(None, (result.task, result.settings)))
    path = folder / result.subject / f"{quote(name, safe=' ,')[:200]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(asdict(result))))


def read_results(folder: Path, subject: str) -> Iterator[HarnessResult]:
    """Yield all results of a lane or base model, sorted by the name of the file.

    Raises:
        UsageError: A file is damaged.
    """
    for path in sorted(folder.joinpath(subject).glob("[!.]*.json")):
        remedy = "remove it and evaluate again"
        if (found := atomic_files.read_json(path, HarnessResult, "a harness result", remedy)) is not None:
            yield found
