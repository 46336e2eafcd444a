"""Scores of lanes in an evaluation harness, in files beside the records, which can be made again.

`folder` is the store's folder `harness`.

store/harness/<fingerprint>/<task>.json                      a lane
             /base-<content>-<dtype>/<task>.json             a base model without a lane
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from orchestrator.study.configuration import ModelChoice
from orchestrator.util import atomic_files


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
    """A digest of the task, its items and the version of the harness."""
    scores: Mapping[str, Mapping[str, float]]
    """Name of the task, and those of its subtasks -> "METRIC,FILTER" -> score."""
    items: Mapping[str, Mapping[str, Sequence[float]]]
    """Name of a task without subtasks -> "METRIC,FILTER" -> value of each item, if it is a number."""


def base_subject(model: ModelChoice) -> str:
    """Return the subject of a base model without a lane."""
    return f"base-{quote(model.content, safe='')[:40]}-{model.dtype}"


def whole_scores(result: HarnessResult) -> Mapping[str, Mapping[str, float]]:
    """Return the scores of the task or group that was asked for, and for a tag those of its tasks."""
    return {result.task: result.scores[result.task]} if result.task in result.scores else result.scores


def write_result(folder: Path, result: HarnessResult) -> None:
    """Write a result in place of an earlier one of the same subject, task and settings."""
    path = _path(folder, result.subject, result.task, result.settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomically(path, atomic_files.add_checksum(json.dumps(asdict(result))))


def read_result(folder: Path, subject: str, task: str, settings: str) -> HarnessResult | None:
    """Return a result; None if there is none.

    Raises:
        UsageError: The file is damaged.
    """
    return _read(_path(folder, subject, task, settings))


def read_results(folder: Path, subject: str) -> Iterator[HarnessResult]:
    """Yield all results of a lane or base model, sorted by the name of the file.

    Raises:
        UsageError: A file is damaged.
    """
    for path in sorted(folder.joinpath(subject).glob("[!.]*.json")):
        if (found := _read(path)) is not None:
            yield found


def _read(path: Path) -> HarnessResult | None:
    return atomic_files.read_json(path, HarnessResult, "a harness result", "remove it and evaluate again")


def _path(folder: Path, subject: str, task: str, settings: str) -> Path:
    name = f"{task}, {settings}" if settings else task
    return folder / subject / f"{quote(name, safe=' ,')[:200]}.json"
