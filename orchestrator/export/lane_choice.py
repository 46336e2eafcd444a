"""Choice of the lane to export: the best one of a study, or one whose fingerprint the user gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.analyze.analysis import find_best_lanes
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study, read_studies
from orchestrator.study.names import store_command
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_settings import canonical_name


@dataclass(frozen=True)
class LaneQuery:
    """The lane that the user asks for."""

    study: str
    fingerprint: str = ""
    """First digits of the fingerprint; empty for the best lane."""
    variant: str | None = None
    """The variant whose best lane is wanted; None for the best lane of all variants."""
    task: str | None = None
    """The task whose best lane is wanted; None if the study has only one."""


@dataclass(frozen=True)
class ChosenLane:
    """The lane to export, with its study."""

    study: StudyFile
    record: Record
    """The record of the lane, which has finished."""
    records: Sequence[Record]
    """All records of the study."""
    reason: str
    """Why this lane was chosen, as a clause that can follow "because"."""


def choose_lane(store: Store, output: Path, query: LaneQuery) -> ChosenLane:
    """Find the lane that a query asks for.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        query: The study, and the lane in it.

    Returns:
        The lane, with the names that its variant, task and model have in the study.

    Raises:
        UsageError: There is no such study, variant, task or lane, the lane has not finished, or the query
            fits several tasks or lanes.
    """
    study = find_study(output, query.study)
    found = [record for record in map(store.get, study.configurations) if record is not None]
    records = [study.rename(record) for record in found]
    if query.fingerprint:
        record, reason = _find_lane(store, output, study, query), "its fingerprint was given"
    else:
        fingerprint, reason = _choose_best(study, records, query)
        record = next(each for each in records if each.fingerprint == fingerprint)
    return ChosenLane(study, record, records, reason)


def _find_lane(store: Store, output: Path, study: StudyFile, query: LaneQuery) -> Record:
    """Return the record of the finished lane whose fingerprint begins as the query says.

    Raises:
        UsageError: No lane of the study or more than one begins so, the lane has not finished, or the query
            names a variant or a task, too.
    """
    if query.variant is not None or query.task is not None:
        option = "--variant" if query.variant is not None else "--task"
        raise UsageError(f"export {query.fingerprint}: a fingerprint names one lane; leave {option} out.")
    prefix = query.fingerprint.lower()
    own = [fingerprint for fingerprint in study.configurations if fingerprint.startswith(prefix)]
    fingerprint = own[0] if len(own) == 1 else store.resolve_prefix(query.fingerprint)
    if fingerprint not in study.configurations:
        others = [name for name, each in read_studies(output).items() if fingerprint in each.configurations]
        where = f"it belongs to {', '.join(others)}" if others else f"no study under {output} has it"
        raise UsageError(f"fingerprint {query.fingerprint!r}: not a lane of study {study.name!r}; {where}.")
    record = store.get(fingerprint)
    if record is None or record.state != "finished":
        state = f"{record.state} after {record.steps} steps" if record is not None else "not trained yet"
        command = store_command("export", study.name, output=output, store=store.root)
        raise UsageError(
            f"fingerprint {query.fingerprint!r}: its lane is {state}; only a finished lane has an adapter. "
            f"The best one of the study: {command}"
        )
    return study.rename(record)


def _choose_best(study: StudyFile, records: Sequence[Record], query: LaneQuery) -> tuple[str, str]:
    """Return the fingerprint of the best lane that fits the query, and the reason for the choice as a clause.

    Raises:
        UsageError: No lane that fits the query has finished, or the query does not fit the study.
    """
    wanted = _select(study, list(dict.fromkeys(map(_goal, records))), query)
    lanes = find_best_lanes(study, records).to_dict("records")
    best = [lane for lane in lanes if (lane["task"], lane["variant"]) in wanted]
    if not best:
        states = Counter(record.state for record in records if _goal(record) in wanted)
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no record"
        raise UsageError(
            f"study {study.name!r}: none of these lanes has finished ({counts}); run it: {study.command}"
        )
    lane, *others = best
    reason, number = f"it is the best {lane['variant']}", len({each["variant"] for each in best})
    if number > 1:
        equal = [each["variant"] for each in others if each["validation_score"] == lane["validation_score"]]
        reason += f", the best of {number} variants" + (f" together with {', '.join(equal)}" if equal else "")
    if len(records) < len(study.configurations):
        reason += f" ({len(records)} of {len(study.configurations)} configurations have ended)"
    return lane["fingerprint"], reason


def _goal(record: Record) -> tuple[str, str]:
    """Return the task and the variant of a record."""
    return record.configuration.task.name, record.configuration.variant.name


def _select(study: StudyFile, goals: Sequence[tuple[str, str]], query: LaneQuery) -> set[tuple[str, str]]:
    """Return those of a study's tasks and variants that fit --task and --variant.

    Raises:
        UsageError: The study has no such task or variant, or it has several tasks and the query names none.
    """
    tasks = sorted({task for task, _ in goals})
    if query.task is not None and query.task not in tasks:
        raise UsageError(f"--task {query.task!r}: not in study {study.name!r}. {_suggest(query.task, tasks)}")
    if query.task is None and len(tasks) > 1:
        raise UsageError(
            f"study {study.name!r} has {len(tasks)} tasks, whose scores cannot be compared; add --task with "
            f"one of {', '.join(tasks)}."
        )
    goals = [goal for goal in goals if query.task in (None, goal[0])]
    if query.variant is None:
        return set(goals)
    variants, variant = sorted({own for _, own in goals}), canonical_name(query.variant)
    if variant not in variants:
        raise UsageError(
            f"--variant {query.variant!r}: not in study {study.name!r}. {_suggest(query.variant, variants)}"
        )
    return {goal for goal in goals if goal[1] == variant}


def _suggest(value: str, choices: Sequence[str]) -> str:
    return suggest_nearest(value, choices) if choices else "It has no record yet."
