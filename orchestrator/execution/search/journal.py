"""The points of a search, in Optuna's own storage: `<study>/optuna.journal`, one Optuna study per group.

Each point that was asked for is an Optuna trial with the configuration's fingerprint as a user attribute. Its
result is read from the record in the store. `optuna-dashboard <study>/optuna.journal` shows the search.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna import Study, create_study, load_study
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, create_trial

from orchestrator.execution.search.groups import SearchGroup
from orchestrator.execution.search.samplers import distributions, from_optuna_params, to_optuna_params
from orchestrator.study.configuration import Value
from orchestrator.study.space import Dimension
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, format_error

JOURNAL_FILE = "optuna.journal"
FINGERPRINT, TASK, ORDER = "fingerprint", "task", "order"
"""User attributes of a point's trial. ORDER is the point's number among the points of all groups."""
REJECTED = "rejected"
"""User attribute of a suggestion that became no point: it was known, or the variant refuses its values."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One configuration that a search has asked for."""

    group: str
    """The name of its group."""
    task: str
    parameters: Mapping[str, Value]
    fingerprint: str
    trial: FrozenTrial | None = field(default=None, compare=False)
    """The trial in the journal; None for a point that is not in the journal yet."""


def read_points(
    folder: Path, groups: Mapping[str, SearchGroup], searched: Collection[str]
) -> tuple[list[Point], dict[str, list[FrozenTrial]]]:
    """Read the points that a study's search has asked for. Writes nothing.

    Args:
        folder: The study's folder.
        groups: The groups that are searched now, by name.
        searched: The names of all groups that the study has searched.

    Returns:
        The points of `groups`, in the order in which they were asked for, and group -> trials of the other
        groups, which earlier runs have searched.

    Raises:
        UsageError: The file is damaged. An incomplete last line is skipped with a warning: its point was not
            trained, because a point is trained only after its line is written.
    """
    path = folder / JOURNAL_FILE
    if not path.exists():
        return [], {}
    found: list[tuple[int, Point]] = []
    others: dict[str, list[FrozenTrial]] = {}
    try:
        for name, trials in read_trials(path).items():
            if name not in searched:
                raise ValueError(f"the study has not searched {name!r}")
            if name not in groups:
                others[name] = trials
                continue
            for trial in _points_only(trials):
                parameters = from_optuna_params(groups[name].dimensions, trial.params)
                attributes = trial.user_attrs
                point = Point(name, attributes[TASK], parameters, attributes[FINGERPRINT], trial)
                found.append((attributes[ORDER], point))
    except Exception as error:  # replaying a damaged journal raises errors of many kinds
        raise UsageError(
            f"{path}: not the journal of a search ({format_error(error)}); put the whole file back, or take "
            "another --study"
        ) from error
    return [point for _, point in sorted(found, key=lambda pair: pair[0])], others


def read_trials(path: Path) -> dict[str, list[FrozenTrial]]:
    """Replay a journal file, and return group -> trials. Each group is an Optuna study of the same name."""
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        _log.warning("%s: its last line is torn: left out", path)
    storage = JournalStorage(_ListBackend([json.loads(line) for line in lines]))
    studies = storage.get_all_studies()
    return {study.study_name: storage.get_all_trials(study._study_id) for study in studies}


def _points_only(trials: Iterable[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Yield the trials that are points.

    Raises:
        ValueError: A trial is neither a point nor a rejected suggestion, so something else has changed the
            file. Only the last trial may lack attributes, if the driver was killed before it wrote them.
    """
    trials = list(trials)
    for trial in trials:
        if FINGERPRINT in trial.user_attrs:
            yield trial
        elif REJECTED not in trial.user_attrs and (trial.state.is_finished() or trial is not trials[-1]):
            raise ValueError(f"trial {trial.number} has no fingerprint")


class _ListBackend(BaseJournalBackend):
    """Backend of Optuna's journal storage that keeps the journal in a list."""

    def __init__(self, logs: list[dict[str, Any]]) -> None:
        self.logs = logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self.logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs.extend(logs)


def write_journal(folder: Path, trials: Mapping[str, Iterable[FrozenTrial]]) -> None:
    """Replace a study's journal atomically.

    Args:
        folder: The study's folder.
        trials: Group -> its trials, in the order in which they are numbered.
    """
    backend = _ListBackend([])
    storage = JournalStorage(backend)
    for name, each in trials.items():
        create_study(storage=storage, study_name=name, direction="maximize").add_trials(each)
    text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in backend.logs)
    atomic_files.write_atomically(folder / JOURNAL_FILE, text.encode())


def open_studies(folder: Path, samplers: Mapping[str, BaseSampler]) -> dict[str, Study]:
    """Open the Optuna studies of the groups in a study's journal, each with its sampler.

    The caller holds the study's lock, so an existing lock of Optuna belongs to a killed process.
    """
    path = folder / JOURNAL_FILE
    Path(f"{path}.lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    return {name: load_study(study_name=name, storage=storage, sampler=s) for name, s in samplers.items()}


def make_trial(point: Point, order: int, dimensions: Sequence[Dimension], **state: Any) -> FrozenTrial:
    """Make the trial of a point.

    Args:
        point: The point. The system attributes of its earlier trial, which samplers write, are kept.
        order: The point's number among all points.
        dimensions: The space of the point's group.
        **state: `state`, `value` and `intermediate_values` of `optuna.create_trial`.
    """
    return create_trial(
        params=point.trial.params if point.trial else to_optuna_params(dimensions, point.parameters),
        distributions=distributions(dimensions),
        user_attrs={FINGERPRINT: point.fingerprint, TASK: point.task, ORDER: order},
        system_attrs=dict(point.trial.system_attrs) if point.trial else None,
        **state,
    )
