"""The choice of the waiting lanes that a trainer may lease next, as functions of the broker's state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.execution.broker.lane_entry import LaneEntry
from orchestrator.util import timeouts

MAX_GROUP_FAILURES = 3
"""Failures in a row of the lanes of one group key, after which the other group keys go first. A trainer
ends after as many lanes in a row that fail with one message; see `finetune/engine/recovery.py`."""


@dataclass
class TrainerView:
    """The broker's state of one incarnation of a trainer."""

    last_contact: float
    """Time of the trainer's last call, on the broker's clock."""
    group_key: str | None = None
    draining_for: str | None = None
    """The group key that the trainer takes once its present lane group is empty. Until then the trainer gets
    no lanes."""
    lanes: set[str] = field(default_factory=set)
    """Fingerprints of the lanes that the trainer holds."""
    leased_at: float = 0.0
    """Time of the trainer's last lease of a lane, on the broker's clock."""
    max_lanes: int = 0
    """The number of lanes of its group key that the trainer can hold, by its last call; 0 if unknown."""


def parse_trainer_name(trainer_id: str) -> str:
    """Return the name in a trainer's id, which has the form NAME.INCARNATION."""
    return trainer_id.partition(".")[0]


def select_lanes(
    waiting: Iterable[LaneEntry], group_key: str | None, group: Sequence[LaneEntry], limit: int
) -> list[LaneEntry]:
    """Return up to `limit` waiting lanes of a group key that may all join a lane group, suspects first."""
    selected: list[LaneEntry] = []
    for entry in sorted(waiting, key=lambda entry: entry.max_group_size is None):
        if len(selected) == limit:
            break
        if entry.group_key == group_key and can_join(entry, [*group, *selected]):
            selected.append(entry)
    return selected


def count_usable_lanes(trainers: Iterable[TrainerView], entries: Iterable[LaneEntry]) -> list[int]:
    """Return for each trainer how many lanes a search may keep unfinished for it.

    These are the lanes that it holds and the waiting lanes of its group key that have room, and one more if
    there is still room and no lane of another group key waits: only the next point shows whether it may join
    the lane group. An empty trainer counts as one lane.

    Args:
        trainers: The trainers; those that have not told their limit yet are left out.
        entries: All lanes that have not ended.
    """
    waiting = Counter(entry.group_key for entry in entries if entry.needs_trainer)
    views = [view for view in trainers if view.max_lanes]
    usable = []
    for view in views:
        joining = min(max(0, view.max_lanes - len(view.lanes)), waiting[view.group_key or ""])
        joining = joining if view.lanes else 0
        waiting[view.group_key or ""] -= joining
        usable.append(len(view.lanes) + joining)
    others = waiting.total()
    for number, view in enumerate(views):
        if usable[number] < (view.max_lanes if view.lanes else 1):
            usable[number] += not others or not view.lanes
            others = max(0, others - 1)
    return usable


def can_join(entry: LaneEntry, group: Sequence[LaneEntry]) -> bool:
    """Return whether a lane may train in one lane group with the given lanes.

    Suspects join only suspects of the same crash, and only as many as each of them allows.
    """
    limits = [one.max_group_size for one in (*group, entry) if one.max_group_size is not None]
    return not limits or (len(group) < min(limits) and all(one.crash_id == entry.crash_id for one in group))


def groups_in_training(
    trainers: Mapping[str, TrainerView], steps_taken: Mapping[str, int], without: Collection[str]
) -> set[str | None]:
    """Return the group keys whose lanes some trainer trains, which are probably not at fault.

    Args:
        trainers: All trainers.
        steps_taken: The optimizer steps of each trainer.
        without: Trainers to leave out.
    """
    return {v.group_key for t, v in trainers.items() if t not in without and v.lanes and steps_taken.get(t)}


def choose_group_key(view: TrainerView, waiting: list[LaneEntry], failures: Counter[str]) -> str | None:
    """Return the group key for an empty lane group, or None if no lane waits.

    The group key that the trainer has drained for comes first. The other keys are ordered by fewest failures,
    so that lanes that can be trained are trained early, then keys with a suspect first, then by most waiting
    lanes.
    """
    counts = Counter(entry.group_key for entry in waiting)
    if view.draining_for in counts:
        return view.draining_for
    suspects = {entry.group_key for entry in waiting if entry.max_group_size is not None}
    return min(counts, key=lambda key: (failures[key], key not in suspects, -counts[key]), default=None)


def assign_starved_groups(
    entries: Iterable[LaneEntry], views: Sequence[TrainerView], failures: Counter[str], now: float
) -> None:
    """Let trainers drain for lanes that have waited longer than STARVATION_SECONDS.

    A draining trainer gets no lanes until its lane group is empty, and then serves another group key. For a
    suspect, which may not join a lane group, any trainer may be drained. For any other lane, a trainer may be
    drained if it has leased no lane for STARVATION_SECONDS and no lane with its own group key waits, so that
    its lane group cannot become fuller. None is drained if a trainer serves the lane's group key, or after
    MAX_GROUP_FAILURES failures in a row of this group key. Of the possible trainers, the one with the fewest
    lanes is drained.

    Args:
        entries: All lanes that have not ended.
        views: The trainers that are not about to end. `draining_for` is set for the chosen trainers.
        failures: Failures in a row by group key.
        now: Time on the broker's clock.
    """
    waiting = [entry for entry in entries if entry.needs_trainer]
    refillable = {entry.group_key for entry in waiting}
    drained_for = {view.draining_for for view in views}
    served = {view.group_key for view in views if view.lanes} | drained_for
    for entry in waiting:
        if not _is_long_ago(entry.waiting_since, now):
            continue
        key = entry.group_key
        candidates = [view for view in views if view.lanes and view.draining_for is None]
        if entry.max_group_size is not None:
            is_starved = key not in drained_for
        else:
            is_starved = key not in served and failures[key] < MAX_GROUP_FAILURES
            candidates = [
                view
                for view in candidates
                if view.group_key not in refillable and _is_long_ago(view.leased_at, now)
            ]
        if is_starved and candidates:
            min(candidates, key=lambda view: len(view.lanes)).draining_for = key
            drained_for.add(key)
            served.add(key)


def _is_long_ago(then: float, now: float) -> bool:
    return now - then > timeouts.STARVATION_SECONDS
