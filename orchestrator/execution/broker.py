"""The broker's decisions about trainers and lanes, as a state machine without I/O.

Lanes are keyed by fingerprint. A trainer is known by its name, which no other trainer gets; one that has
ended gets no lanes any more. Time, in seconds on the broker's clock, is an argument.

Lanes of one group key train together. A trainer without lanes takes the group key with most waiting lanes. If
no lane waits for a while, it takes over lanes of the trainer with most lanes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from orchestrator.execution.lane_entry import HeldLanes, LaneEntry, LeasePhase
from orchestrator.execution.schedulers import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.record.schema import LaneProgress, Record, RecordState
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

DRIVER = "driver"
"""The name under which the driver submits the lanes of `BrokerCore.backlog`, as if it were a trial."""
BROKER_NAME = "broker"
"""Name of the broker's actor in the Ray namespace of the study."""
MAX_FAILURES_PER_TRAINER = 3
"""With n trainers at once, a study survives n + 1 times this many failures in a row."""
MIN_MOVED_SHARE = 0.25
"""The share of a lane's steps that must be left for an idle trainer to take the lane over."""


class ExitKind(StrEnum):
    """The reason for which a trainer ended."""

    DONE = "done"
    """The trainer ended without an error: no lane was left, or it was drained. Its node does not matter."""
    LOST = "lost"
    """The trainer ended with an error because a node was lost or drained, or Ray found no place for it.
    Nothing is at fault."""
    CRASHED = "crashed"
    """A worker or the controller died after the trainer had started, or a device was lost; no node was."""
    FAILED = "failed"
    """A worker raised another error, or a process died before the trainer had announced its place."""


class EndedLane(NamedTuple):
    """The end of a lane."""

    fingerprint: str
    state: RecordState


@dataclass(frozen=True)
class TrainerPlace:
    """Where a trainer runs."""

    node_ids: tuple[str, ...]
    device: str
    """The device as the user reads it, for example "GPU 3 of node 10.0.0.7"."""
    placement_group: Any = None


@dataclass(frozen=True)
class Updates:
    """What the driver reads from the broker at every poll."""

    events: Sequence[LaneProgress | EndedLane | str] = ()
    """New starts, reports and ends of lanes and lines for the user, in order."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of lanes in each phase, and of "trainers" that call the broker."""
    steps_taken: dict[str, int] = field(default_factory=dict)
    """Optimizer steps of each trainer, also of those that have ended."""
    places: dict[str, TrainerPlace] = field(default_factory=dict)
    """Place of each trainer that has started and whose end the driver has not reported yet."""
    announced: dict[str, tuple[ExitKind, str]] = field(default_factory=dict)
    """Kind and reason of the end that each of these trainers has announced."""
    hung: Sequence[str] = ()
    """Trainers that have been silent for too long and whose end the driver has not reported yet."""
    max_lanes: Sequence[int] = ()
    """The number of lanes that each trainer can hold, of those that have told it."""
    abort_reason: str = ""
    """The reason to end the study; empty while it goes on."""

    @property
    def num_training(self) -> int:
        """The number of lanes that trainers hold."""
        return self.counts["leased"] + self.counts["paused"]


class LaneRecords:
    """What the broker reads from the store and writes there. This class stands for an empty store."""

    def newest_checkpoint(self, fingerprint: str) -> tuple[int, int]:
        """Return the highest attempt that has left checkpoints, and the highest step of a checkpoint.

        Both are 0 without checkpoints. Each attempt has a folder of its own.
        """
        return 0, 0

    def count_failures(self, fingerprint: str) -> int:
        """Return how often the lane has failed before."""
        return 0

    def find_record(self, configuration: Configuration) -> Record | None:
        """Return the record that answers a request for a configuration, if there is one."""
        return None

    def write_failure(self, entry: LaneEntry, reason: str) -> RecordState:
        """Write the record of a lane that crashes trainers.

        Returns:
            The state of the record that counts, which another process may have written before.
        """
        return "failed"


@dataclass
class TrainerView:
    """The broker's state of one trainer."""

    last_contact: float
    """Time of the trainer's last call."""
    max_lanes: int = 0
    """The number of lanes that the trainer can hold, by its last call; 0 if unknown."""
    last_room: dict[str, int] = field(default_factory=dict)
    """The group key that the trainer has trained last -> the number of these lanes that it can hold."""
    idle_since: float = math.inf
    """Time since which the trainer has asked for lanes without holding one; infinite if it holds one."""


class BrokerCore:
    """Match waiting lanes with trainers and keep the state of both.

    Args:
        records: The store.
        scheduler: The study's early stopping, or "none". Under early stopping, lanes pause after each report.
    """

    def __init__(self, records: LaneRecords | None = None, scheduler: str = "none") -> None:
        self.records, self.scheduler = records or LaneRecords(), scheduler
        self.entries: dict[str, LaneEntry] = {}
        self.open_entries: dict[str, LaneEntry] = {}
        """The entries that have not ended. Every lease iterates over them, so they must not grow with the
        study."""
        self.backlog: deque[Configuration] = deque()
        """The configurations of a grid that are not submitted yet."""
        self.trainers: dict[str, TrainerView] = {}
        """The trainers that have called and not ended."""
        self.gone: set[str] = set()
        """Trainers that have ended or were taken for dead."""
        self.hung: set[str] = set()
        self.places: dict[str, TrainerPlace] = {}
        self.announced: dict[str, tuple[ExitKind, str]] = {}
        self.steps_taken: dict[str, int] = {}
        self.events: list[LaneProgress | EndedLane | str] = []
        """The events that the driver has not acknowledged."""
        self.num_acknowledged = 0
        self.last_tick: float | None = None
        self.draining: set[str | None] = set()
        """Trainers that must return their lanes and end; None stands for all trainers."""
        self.max_live_trainers = 1
        """The largest number of trainers that were alive at once."""
        self.failures_in_a_row = 0
        """Failures since a lane last made progress. The end of a trainer counts only after its first step;
        the driver counts those before, by slot. A crash of a trainer that held lanes does not count, but a
        lane that fails after its crashes does."""
        self.failures_by_group: Counter[str] = Counter()
        """Failures in a row of the lanes of a group key, and crashes of their trainers."""
        self.abort_reason = ""
        """The reason to end the study; empty while it goes on."""

    # -- trials

    def submit(self, trial: str, configuration: Configuration) -> None:
        """Register a trial for a configuration.

        The trial joins the lane if the lane is in training, and gets the reports of the record if one exists.
        """
        self._entry_for(configuration).add_trial(trial)

    def next_report(self, fingerprint: str, after: int) -> Report | RecordState | None:
        """Return the next report or last state of a submitted lane; see `LaneEntry.next_report`."""
        return self.entries[fingerprint].next_report(after)

    def release(self, trial: str) -> None:
        """Remove a trial that the scheduler did not stop.

        Its lane is dropped unless another trial wants it.
        """
        for entry in [entry for entry in self.open_entries.values() if trial in entry.trials]:
            entry.trials.discard(trial)
            self._settle(entry)

    def stop(self, trial: str, configuration: Configuration, stop_step: int) -> None:
        """Remove a trial that the scheduler stopped at the report of step `stop_step`.

        Unless another trial wants the lane, it ends early with a record, even if no trainer holds it.
        """
        entry = self._entry_for(configuration)
        entry.trials.discard(trial)
        if not entry.trials:
            entry.stop(stop_step)

    # -- trainers

    def lease(self, trainer: str, group_key: str | None, capacity: int, now: float) -> LeaseGrant:
        """Return lanes for a trainer that has just announced the lanes that it holds, by `exchange`.

        Args:
            trainer: The trainer.
            group_key: The group key of the trainer's lane group. None allows any group key: the group is
                empty, or all of its lanes have been paused for long.
            capacity: The largest number of lanes to return.
            now: The time.
        """
        view = self._contact(trainer, now)
        if view is None or self._must_drain(trainer):
            return LeaseGrant(closed=True)
        groups = self._list_groups()
        waiting, group = groups[""], groups[trainer]
        may_join = group_key is None or not any(entry.alone for entry in group)
        offered = [entry for entry in waiting if may_join and entry.moves_to in ("", trainer)]
        selected, leases = self._select(offered, group_key, capacity), []
        for entry in selected:
            attempt, checkpoint_step = self.records.newest_checkpoint(entry.fingerprint)
            entry.note_checkpoint(checkpoint_step)
            entry.lease(trainer, max(entry.attempt, attempt) + 1)
            settings = scheduler_settings(self.scheduler, entry.configuration)
            leases.append(Lease(entry.configuration, entry.attempt, settings))
            self.events.append(LaneProgress(entry.configuration))
        is_idle = group_key is None and not group and not selected
        view.idle_since = min(view.idle_since, now) if is_idle else math.inf
        if now - view.idle_since >= timeouts.TAKEOVER_SECONDS:
            self._take_over(trainer)
        return LeaseGrant(
            tuple(leases),
            requires_empty_group=bool(selected and group) and any(e.alone for e in [*group, *selected]),
        )

    def _select(self, offered: list[LaneEntry], group_key: str | None, capacity: int) -> list[LaneEntry]:
        """Choose lanes of one group key; a lane that must be alone comes without others.

        If the trainer takes any group key, the group keys with fewest failures come first, so that lanes that
        can be trained are trained early. Ties: the lane with fewest crashes, one that must be alone, and the
        group key with most waiting lanes.
        """
        if group_key is None:
            failures, counts = self.failures_by_group, Counter(entry.group_key for entry in offered)
            offered.sort(
                key=lambda e: (failures[e.group_key], e.crashes_alone, not e.alone, -counts[e.group_key])
            )
            if offered and offered[0].alone:
                return offered[:1]
            group_key = offered[0].group_key if offered else ""
        return [e for e in offered if e.group_key == group_key and not e.alone][:capacity]

    def _take_over(self, trainer: str) -> None:
        """Mark lanes to move to an idle trainer: up to half of the lanes of the trainer that has the most.

        The lanes with the most remaining steps are marked; of lanes with equally many, the newest. A lane
        with less than MIN_MOVED_SHARE of its steps left is not marked. If the idle trainer has trained
        another group key last, only one lane is marked, because the lane waits while the trainer loads the
        model. While a lane is marked for this trainer, no other lane is.
        """
        entries = self.open_entries.values()
        trained = [e for e in entries if e.phase is LeasePhase.LEASED and e.trials and not e.moves_to]
        counts = Counter(entry.trainer for entry in trained if not self._must_drain(entry.trainer))
        shared = [entry for entry in trained if counts[entry.trainer] > 1]
        movable = [e for e in shared if e.remaining_steps >= MIN_MOVED_SHARE * e.num_steps]
        if movable and not any(entry.moves_to == trainer for entry in entries):
            most = max(movable, key=lambda entry: counts[entry.trainer]).trainer
            of_most = [entry for entry in movable if entry.trainer == most]
            ranked = sorted(of_most, key=lambda entry: entry.remaining_steps)[::-1]
            for entry in ranked[: min(counts[most] // 2, self._room_for(ranked[0], trainer))]:
                entry.moves_to = trainer

    def _forget_moves(self) -> None:
        """Unmark the lanes that cannot move any more: clear their `moves_to`.

        The trainer to which such a lane would move has ended, must drain, has no room, or trains lanes beside
        which this lane may not train.
        """
        groups = self._list_groups()
        for entry in [entry for entry in self.open_entries.values() if entry.moves_to]:
            taker, group = entry.moves_to, groups[entry.moves_to]
            joins = all(e.group_key == entry.group_key and not (e.alone or entry.alone) for e in group)
            if joins and len(group) < self._room_for(entry, taker) and not self._must_drain(taker):
                group.append(entry)
            else:
                entry.moves_to = ""

    def _room_for(self, entry: LaneEntry, trainer: str) -> int:
        """Return how many lanes of the entry's group key a trainer can hold.

        A trainer that has not trained this group key last counts with 1, and one that has ended with 0.
        """
        view = self.trainers.get(trainer)
        return view.last_room.get(entry.group_key, 1) if view is not None else 0

    def heartbeat(self, trainer: str, now: float) -> None:
        """Note that a trainer is alive although its loop makes no calls."""
        if trainer in self.trainers:
            self.trainers[trainer].last_contact = now

    def exchange(
        self, trainer: str, held: HeldLanes, steps_taken: int, max_lanes: int, now: float
    ) -> dict[str, Directive]:
        """Take a trainer's reports and return the directives for its lanes, by fingerprint.

        The broker puts a lane back into the queue if it had leased the lane to this trainer and the lane is
        not in `held`.

        Args:
            trainer: The trainer.
            held: All lanes that the trainer holds, by fingerprint.
            steps_taken: The trainer's optimizer steps so far; see `LaneSource`.
            max_lanes: The number of lanes that the trainer can hold now.
            now: The time.
        """
        view = self._contact(trainer, now)
        if view is None:
            return dict.fromkeys(held, Directive.DROP)
        view.max_lanes = max_lanes
        self.steps_taken[trainer] = steps_taken
        group = self._list_groups()[trainer]
        if held and group:
            view.last_room = {group[0].group_key: max_lanes}
        for entry in group:
            _, report = held.get(entry.fingerprint, (0, None))
            if entry.fingerprint not in held:
                entry.requeue()
                self._settle(entry)
            elif report is not None and entry.add_report(trainer, report):
                self._note_progress(entry.group_key)
                self.events.append(
                    LaneProgress(entry.configuration, report.step, report.scores, report.curve)
                )
        self._forget_moves()
        directives, drains = dict.fromkeys(held, Directive.DROP), self._must_drain(trainer)
        for fingerprint in held.keys() & self.open_entries.keys():
            attempt, _ = held[fingerprint]
            directives[fingerprint] = self.open_entries[fingerprint].directive(trainer, attempt, drains)
        return directives

    def return_lease(self, trainer: str, fingerprint: str, attempt: int) -> None:
        """Requeue a lane that its trainer has given back; see `LaneSource.return_lease`."""
        entry = self.open_entries.get(fingerprint)
        if entry is not None and entry.is_held_by(trainer, attempt):
            entry.requeue()
            self._settle(entry)

    def end_lease(self, trainer: str, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Note how a lane has ended on a trainer; its record, if any, is in the store."""
        if (entry := self.open_entries.get(fingerprint)) is None:
            return
        if state != "failed":
            self._note_progress(entry.group_key)
        elif entry.is_held_by(trainer, attempt):
            self.failures_by_group[entry.group_key] += 1
        entry.end_lease(trainer, attempt, state)
        self._settle(entry)

    def trainer_exited(self, trainer: str, kind: ExitKind, reason: str) -> int:
        """Requeue the lanes of a trainer that has ended; after a crash they train alone.

        Args:
            trainer: The trainer.
            kind: The kind of its end.
            reason: The reason in one line, for the record of a lane that crashes trainers.

        Returns:
            The number of lanes that the trainer held; 0 if it was removed before because it hung.
        """
        self.places.pop(trainer, None)
        self.announced.pop(trainer, None)
        self.hung.discard(trainer)
        return 0 if trainer in self.gone else self._remove_trainer(trainer, kind, reason)

    def _remove_trainer(self, trainer: str, kind: ExitKind, reason: str) -> int:
        held, crashed = self._list_groups()[trainer], kind is ExitKind.CRASHED
        self.trainers.pop(trainer, None)
        self.gone.add(trainer)
        for entry in held:
            _, checkpoint_step = self.records.newest_checkpoint(entry.fingerprint)
            if entry.note_checkpoint(checkpoint_step):
                self.failures_in_a_row = 0
            if crashed and entry.note_crash(was_only_lane=len(held) == 1):
                why = f"the trainer's process died while the lane trained alone: {reason}"
                entry.end(self.records.write_failure(entry, why))
                self.failures_in_a_row += 1
            else:
                entry.requeue()
            self._settle(entry)
        if crashed and held:
            self.failures_by_group[held[0].group_key] += 1
        elif kind in (ExitKind.CRASHED, ExitKind.FAILED) and self.steps_taken.get(trainer):
            self.failures_in_a_row += 1
        failures = self.failures_in_a_row
        if failures > MAX_FAILURES_PER_TRAINER * (1 + self.max_live_trainers) and not self.abort_reason:
            what = f"Trainers died {failures} times in a row while no lane got any further"
            self.abort_reason = f"{what}; see the messages above."
        return len(held)

    def tick(self, now: float) -> None:
        """Remove the trainers that have not called the broker for TRAINER_SILENT_SECONDS.

        Their lanes are treated as after a crash, because one of them may have hung the trainer. If the broker
        was itself stopped, so that it called this method last more than half of TRAINER_SILENT_SECONDS ago,
        the silence of every trainer is counted from now on.
        """
        limit = timeouts.TRAINER_SILENT_SECONDS
        was_paused = self.last_tick is not None and now - self.last_tick > limit / 2
        self.last_tick = now
        for trainer, view in list(self.trainers.items()):
            if was_paused:
                view.last_contact = now
            elif now - view.last_contact > limit:
                self._remove_trainer(trainer, ExitKind.CRASHED, "it hung")
                self.hung.add(trainer)

    # -- the driver

    def get_updates(self, num_read: int, now: float, max_open: int = 0) -> Updates:
        """Submit configurations of the backlog, and return the updates for the driver since its last call.

        Args:
            num_read: Number of events that the driver has ever read; they are forgotten.
            now: The time.
            max_open: The number of lanes up to which configurations are submitted.
        """
        self.tick(now)
        while self.backlog and len(self.open_entries) < max_open:
            self.submit(DRIVER, self.backlog.popleft())
        num_new = max(0, num_read - self.num_acknowledged)
        del self.events[:num_new]
        self.num_acknowledged += num_new
        counts = Counter(str(entry.phase) for entry in self.open_entries.values())
        counts["ended"] = len(self.entries) - len(self.open_entries)
        counts["trainers"] = len(self.trainers)
        return Updates(
            tuple(self.events),
            counts,
            self.steps_taken,
            self.places,
            self.announced,
            sorted(self.hung),
            [view.max_lanes for view in self.trainers.values() if view.max_lanes],
            self.abort_reason,
        )

    # -- helpers

    def _list_groups(self) -> defaultdict[str, list[LaneEntry]]:
        """Return the lanes of each trainer, and with the key "" those that wait."""
        groups: defaultdict[str, list[LaneEntry]] = defaultdict(list)
        for entry in self.open_entries.values():
            if entry.phase is not LeasePhase.RETURNED:
                groups[entry.trainer].append(entry)
        return groups

    def _must_drain(self, trainer: str) -> bool:
        return not self.draining.isdisjoint((None, trainer))

    def _contact(self, trainer: str, now: float) -> TrainerView | None:
        """Note a call of a trainer; None for a trainer that has ended."""
        if trainer in self.gone:
            return None
        view = self.trainers.setdefault(trainer, TrainerView(now))
        view.last_contact = now
        self.max_live_trainers = max(self.max_live_trainers, len(self.trainers))
        return view

    def _note_progress(self, group_key: str) -> None:
        self.failures_in_a_row = 0
        self.failures_by_group.pop(group_key, None)

    def _entry_for(self, configuration: Configuration) -> LaneEntry:
        """Return the entry for `configuration`, created with the store's failure count and record."""
        fingerprint = configuration.fingerprint
        if fingerprint not in self.entries:
            failures = self.records.count_failures(fingerprint)
            entry = LaneEntry(configuration, self.scheduler != "none", failures)
            self.entries[fingerprint] = self.open_entries[fingerprint] = entry
            if (record := self.records.find_record(configuration)) is not None:
                entry.replay(record)
                self._settle(entry)
        return self.entries[fingerprint]

    def _settle(self, entry: LaneEntry) -> None:
        """Close a lane that has ended; forget one that no trainer holds and no trial wants."""
        if entry.state is not None:
            del self.open_entries[entry.fingerprint]
            self.events.append(EndedLane(entry.fingerprint, entry.state))
        elif not entry.trainer and not entry.is_wanted:
            del self.entries[entry.fingerprint], self.open_entries[entry.fingerprint]
