"""The broker's mind: which trainer trains which lane. A plain state machine; time comes in as an argument.

Lanes are keyed by fingerprint. A trainer is known by its incarnation (a new process is a new trainer). Nothing here
is the truth: records are, in the store. After a restart trials submit again and trainers say what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.execution.broker.lane_entry import LaneEntry, LeasePhase
from orchestrator.execution.trainers.exit_status import ExitKind, FailurePolicy
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.record.schema import Record, RecordState
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

MAX_GROUP_FAILURES = 3  # failures in a row of a shape's lanes: so many end a trainer, see finetune/loop.py

HeldLane = tuple[int, Configuration, Report | None]
"""A lane as its trainer names it: attempt, configuration, the last report of this attempt."""


@dataclass
class TrainerView:
    """What the broker knows of a trainer. `yields_to`: a shape for which it drains its lane group."""

    last_contact: float
    group_key: str | None = None
    draining_for: str | None = None
    lanes: set[str] = field(default_factory=set)


class BrokerCore:
    def __init__(
        self,
        newest_attempt: Callable[[str], int] = lambda fingerprint: 0,
        count_failures: Callable[[str], int] = lambda fingerprint: 0,
        find_record: Callable[[Configuration], Record | None] = lambda configuration: None,
        scheduler: str = "none",
        write_failure: Callable[
            [LaneEntry, Configuration, str], RecordState
        ] = lambda entry, configuration, why: "failed",
        checkpoint_step: Callable[[str], int] = lambda fingerprint: 0,
    ) -> None:
        """`newest_attempt`: the highest attempt that left checkpoints, so that a new one has its own folder.
        `failures`: how often a lane has failed before, whoever trained it.
        `known`: the record that answers a request, if there is one.
        `scheduler`: the study's early stopping; with any, lanes park after a report.
        `give_up`: writes the record of a lane that crashes whatever trainer trains it; returns the state of the
        record that counts.
        `saved`: the step of a lane's newest checkpoint, 0 without one."""
        self.newest_attempt, self.count_failures, self.find_record = (
            newest_attempt,
            count_failures,
            find_record,
        )
        self.scheduler, self.write_failure, self.checkpoint_step = scheduler, write_failure, checkpoint_step
        self.entries: dict[str, LaneEntry] = {}
        self.open_entries: dict[str, LaneEntry] = {}
        """Those that have not ended: what is gone through at every lease must not grow with the study."""
        self.configurations: dict[str, Configuration] = {}
        self.trainers: dict[str, TrainerView] = {}
        self.ended_lanes: list[tuple[str, RecordState]] = []
        """Every lane that ended, in order: the driver reads on from where it was."""
        self.steps_taken: dict[str, int] = {}
        """Optimizer steps that each trainer has taken, also of those that are gone."""
        self.closed = False
        self.draining: set[str] = set()
        """Names of trainers that have to go."""
        self.is_draining_all = False
        self.num_crashes = 0
        self.failure_policy = FailurePolicy()
        self.failures_by_group: Counter[str] = Counter()
        """Shape -> failures in a row of its lanes, and crashes of their trainers."""
        self.silent_since: dict[str, float] = {}
        """Name of a trainer that was taken for dead, and has said nothing since -> since when."""

    # -- trials -----------------------------------------------------------------------------------------

    def submit(self, trial: str, configuration: Configuration, now: float) -> None:
        """A trial wants this configuration. One that is in training is joined, one whose result is known
        replays it."""
        self._entry_for(configuration, now).add_trial(trial, now)

    def next_report(self, fingerprint: str, after: int, now: float) -> Report | RecordState | None:
        """See Life.ask. Raises KeyError when the lane is unknown (the broker restarted: submit again)."""
        return self.entries[fingerprint].next_report(after, now)

    def release(self, trial: str) -> None:
        """The trial has ended, but not by the scheduler's word. Its lane is dropped unless others want it."""
        for fingerprint in [f for f, entry in self.open_entries.items() if trial in entry.trials]:
            self.open_entries[fingerprint].trials.discard(trial)
            self._discard_unwanted(fingerprint)

    def stop(self, trial: str, configuration: Configuration, stop_step: int, now: float) -> None:
        """The scheduler has stopped the trial at the report of step `seen`. Its lane ends early, with a
        record, unless others want it; also when it is on no trainer, or unknown because the broker restarted."""
        entry = self._entry_for(configuration, now)
        entry.trials.discard(trial)
        if not entry.trials:
            entry.stop(stop_step, now)

    # -- trainers ------------------------------------------------------------------------------------------

    def lease(self, trainer_id: str, group_key: str | None, free_slots: int, now: float) -> LeaseGrant:
        """Lanes for a trainer that has just said, by `exchange`, what it holds. Lanes that are suspected of a
        crash share a lane group with none but suspects of the same, and not with too many of them."""
        view = self._update_contact(trainer_id, now)
        if self._must_drain(trainer_id):
            return LeaseGrant(closed=True)
        if group_key is not None or not view.lanes:
            view.group_key = group_key
        self._assign_starved_groups(now)
        waiting = [entry for entry in self.open_entries.values() if entry.needs_trainer]
        group = self._entries_held_by(trainer_id)
        new_group = list(group)
        if group_key is None:
            new_group = []
            group_key, view.draining_for = self._choose_group_key(view, waiting), None
        elif view.draining_for is not None:
            return LeaseGrant()
        leases: list[Lease] = []
        requires_empty_group = False
        for entry in sorted(waiting, key=_suspects_first):
            if entry.group_key == group_key and len(leases) < free_slots and _can_join(entry, new_group):
                new_group.append(entry)
                requires_empty_group = requires_empty_group or not _can_join(entry, group)
                attempt = max(entry.attempt, self.newest_attempt(entry.fingerprint)) + 1
                entry.lease(trainer_id, attempt)
                view.group_key = group_key
                view.lanes.add(entry.fingerprint)
                configuration = self.configurations[entry.fingerprint]
                leases.append(
                    Lease(configuration, attempt, scheduler_settings(self.scheduler, configuration))
                )
        return LeaseGrant(
            tuple(leases), closed=self.closed and not waiting, requires_empty_group=requires_empty_group
        )

    def heartbeat(self, trainer_id: str, now: float) -> None:
        """A sign of entry from a trainer that is too busy for more."""
        self.silent_since.pop(parse_trainer_name(trainer_id), None)
        if trainer_id in self.trainers:
            self.trainers[trainer_id].last_contact = now

    def exchange(
        self, trainer_id: str, held: Mapping[str, HeldLane], steps_taken: int, now: float
    ) -> dict[str, Directive]:
        """The trainer names all that it holds, by fingerprint. What it should hold and does not name never
        reached it, and goes back to the queue. What it holds and nobody else was given meanwhile (the broker
        restarted, the trainer was silent for a while) it keeps. `taken`: see Source."""
        view = self._update_contact(trainer_id, now)
        if steps_taken > self.steps_taken.get(trainer_id, 0):
            self.failure_policy.on_step()
        self.steps_taken[trainer_id] = max(steps_taken, self.steps_taken.get(trainer_id, 0))
        for fingerprint, (attempt, configuration, report) in held.items():
            orphan = fingerprint not in self.entries
            entry = self._entry_for(configuration, now)
            if orphan:
                entry.orphan_until = now + timeouts.ORPHAN_LANE_SECONDS
            if entry.phase is LeasePhase.WAITING and entry.attempt <= attempt:
                entry.lease(trainer_id, attempt)
                view.lanes.add(fingerprint)
                view.group_key = view.group_key or configuration.group_key
            if report is not None and entry.add_report(trainer_id, report):
                self._on_group_progress(configuration.group_key)
        for fingerprint in view.lanes - set(held):
            view.lanes.discard(fingerprint)
            self._requeue_lost(trainer_id, fingerprint, now)
        directives = {
            f: self.entries[f].directive(trainer_id, attempt, now) for f, (attempt, _, _) in held.items()
        }
        if self._must_drain(trainer_id):
            directives |= {
                f: Directive.YIELD for f, a in directives.items() if a in (Directive.CONTINUE, Directive.PARK)
            }
        return directives

    def return_lease(self, trainer_id: str, fingerprint: str, attempt: int, now: float) -> None:
        """See Source.spill."""
        view = self._update_contact(trainer_id, now)
        entry = self.entries.get(fingerprint)
        if entry is not None and entry.is_held_by(trainer_id, attempt):
            view.lanes.discard(fingerprint)
            entry.requeue(now)
            self._discard_unwanted(fingerprint)

    def end_lease(
        self, trainer_id: str, fingerprint: str, attempt: int, state: RecordState, now: float
    ) -> None:
        view = self._update_contact(trainer_id, now)
        entry = self.entries.get(fingerprint)
        if entry is None or not (entry.trainer_id == trainer_id and entry.attempt != attempt):
            view.lanes.discard(fingerprint)  # else it has it anew, and only the old lease has ended
        if entry is None or entry.phase is LeasePhase.ENDED:
            return
        if state != "failed":
            self._on_group_progress(entry.group_key)
        elif entry.is_held_by(trainer_id, attempt):
            self.failures_by_group[entry.group_key] += 1
        entry.end_lease(trainer_id, attempt, state, now)
        if entry.state is not None:
            self._close_entry(fingerprint, entry.state)
        else:
            self._discard_unwanted(fingerprint)

    def drain(self, trainer_name: str | None) -> None:
        """The trainers of this name (all incarnations, also to come; None: all trainers) save their lanes, give
        them back and end. A broker that restarts has to be told again."""
        if trainer_name is None:
            self.is_draining_all = True
        else:
            self.draining.add(trainer_name)

    def trainer_exited(self, trainer_name: str, now: float, exit_kind: ExitKind, reason: str = "") -> None:
        """All incarnations of the trainer `name` are gone; `how`, and why, they came to their end."""
        self.silent_since.pop(trainer_name, None)
        trainer_ids = [t for t in self.trainers if parse_trainer_name(t) == trainer_name]
        narrows_suspects = [self.remove_trainer(t, now, exit_kind, reason) for t in trainer_ids]
        if exit_kind in (ExitKind.DONE, ExitKind.PLACEMENT_TIMEOUT, ExitKind.NODE_LOST) or any(
            narrows_suspects
        ):
            return
        if exit_kind is ExitKind.REPEATED_LANE_FAILURES and any(
            self.failures_by_group[entry.group_key] < MAX_GROUP_FAILURES
            for entry in self.open_entries.values()
        ):
            return  # there are others to train
        self.failure_policy.on_trainer_failure()

    def remove_trainer(
        self, trainer_id: str, now: float, exit_kind: ExitKind = ExitKind.DONE, reason: str = ""
    ) -> bool:
        """The trainer has ended or died: its lanes go back to the queue. If it crashed, perhaps for what one of
        them did, they are suspected of it. Returns whether this narrows down which."""
        held = self._entries_held_by(trainer_id)
        self.trainers.pop(trainer_id, None)
        crashed, suspicious = (
            exit_kind is ExitKind.CRASHED,
            exit_kind in (ExitKind.CRASHED, ExitKind.OUT_OF_MEMORY),
        )
        if held and exit_kind not in (ExitKind.DONE, ExitKind.NODE_LOST):
            further = [
                entry.update_checkpoint_step(self.checkpoint_step(entry.fingerprint)) for entry in held
            ]
            if any(further):
                self.failure_policy.on_progress()
            self.failures_by_group[held[0].group_key] += crashed
        self.num_crashes += suspicious
        for entry in held:
            if suspicious:
                entry.mark_suspect(self.num_crashes, len(held), is_proof=crashed)
            if crashed and entry.is_faulty:
                why = f"its trainer's process died while it trained alone: {reason or 'it did not say why'}"
                state = self.write_failure(entry, self.configurations[entry.fingerprint], why)
                self.failure_policy.on_faulty_lane()
                entry.abandon(state)
                self._close_entry(entry.fingerprint, state)
            else:
                self._requeue_lost(trainer_id, entry.fingerprint, now)
        return len(held) > 1 if exit_kind is ExitKind.OUT_OF_MEMORY else crashed and bool(held)

    def tick(self, now: float) -> None:
        """Called now and then: trainers that have been silent for too long are taken for dead."""
        for trainer_id in [
            s
            for s, view in self.trainers.items()
            if now - view.last_contact > timeouts.TRAINER_SILENT_SECONDS
        ]:
            self.silent_since.setdefault(parse_trainer_name(trainer_id), now)
            self.remove_trainer(trainer_id, now)

    def hung_trainers(self, now: float) -> list[str]:
        """Names of trainers that were taken for dead and said nothing for as long again: they hold their place
        for nothing. (A broker that stood still itself hears of the others in between.)"""
        return [
            name for name, since in self.silent_since.items() if now - since > timeouts.TRAINER_SILENT_SECONDS
        ]

    # -- what the driver shows --------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Lanes by phase, and "trainers"."""
        counts = Counter(str(entry.phase) for entry in self.open_entries.values())
        if ended := len(self.entries) - len(self.open_entries):
            counts[str(LeasePhase.ENDED)] = ended
        return {**counts, "trainers": len(self.trainers)}

    @property
    def num_suspects(self) -> int:
        """Lanes that are suspected of a crash: while there are any, deaths of trainers narrow the search."""
        return sum(entry.max_group_size is not None for entry in self.open_entries.values())

    # -- inside -----------------------------------------------------------------------------------------

    def _entries_held_by(self, trainer_id: str) -> list[LaneEntry]:
        lanes = self.trainers[trainer_id].lanes if trainer_id in self.trainers else ()
        return [
            entry
            for f in sorted(lanes)
            if (entry := self.entries.get(f)) is not None and entry.trainer_id == trainer_id
        ]

    def _must_drain(self, trainer_id: str) -> bool:
        return self.is_draining_all or parse_trainer_name(trainer_id) in self.draining

    def _update_contact(self, trainer_id: str, now: float) -> TrainerView:
        view = self.trainers.setdefault(trainer_id, TrainerView(now))
        view.last_contact = now
        self.silent_since.pop(parse_trainer_name(trainer_id), None)
        self.failure_policy.max_live_trainers = max(self.failure_policy.max_live_trainers, len(self.trainers))
        return view

    def _on_group_progress(self, group_key: str) -> None:
        self.failure_policy.on_progress()
        self.failures_by_group.pop(group_key, None)

    def _entry_for(self, configuration: Configuration, now: float) -> LaneEntry:
        """That of this configuration; a new one has failed as often, and may be over, as the store says."""
        fingerprint = configuration.fingerprint
        if fingerprint not in self.entries:
            entry = LaneEntry(
                fingerprint, configuration.group_key, now, pauses_after_report=self.scheduler != "none"
            )
            entry.failures = self.count_failures(fingerprint)
            self.entries[fingerprint] = self.open_entries[fingerprint] = entry
            self.configurations[fingerprint] = configuration
            record = self.find_record(configuration)
            if record is not None:
                entry.replay(record)
                self._close_entry(fingerprint, record.state)
        return self.entries[fingerprint]

    def _close_entry(self, fingerprint: str, state: RecordState) -> None:
        self.ended_lanes.append((fingerprint, state))
        del self.open_entries[fingerprint]

    def _requeue_lost(self, trainer_id: str, fingerprint: str, now: float) -> None:
        entry = self.entries.get(fingerprint)
        if entry is not None and entry.trainer_id == trainer_id:
            entry.requeue(now)
            self._discard_unwanted(fingerprint)

    def _discard_unwanted(self, fingerprint: str) -> None:
        """A lane on no trainer that nobody wants is not kept; one that trains hears of it by its next answer."""
        entry = self.entries[fingerprint]
        if (
            entry.phase in (LeasePhase.WAITING, LeasePhase.RETURNED)
            and not entry.trials
            and not entry.is_stopped
        ):
            del self.entries[fingerprint], self.open_entries[fingerprint], self.configurations[fingerprint]

    def _choose_group_key(self, view: TrainerView, waiting: list[LaneEntry]) -> str | None:
        """For an empty lane group: the shape it drained for, else the one that failed least, so that what can be
        trained is trained first; of several that of a suspect, else the one with most waiting lanes."""
        counts = Counter(entry.group_key for entry in waiting)
        if view.draining_for in counts:
            return view.draining_for
        suspects = {entry.group_key for entry in waiting if entry.max_group_size is not None}
        return min(
            counts, key=lambda s: (self.failures_by_group[s], s not in suspects, -counts[s]), default=None
        )

    def _assign_starved_groups(self, now: float) -> None:
        """A shape that no trainer trains and that has waited too long gets the trainer with the fewest lanes. So
        does a suspect, which may join no lane group. A shape whose lanes all fail waits for its turn."""
        staying = [view for t, view in self.trainers.items() if not self._must_drain(t)]
        drains_for = {view.draining_for for view in staying}
        served = {view.group_key for view in staying if view.lanes} | drains_for
        for entry in self.open_entries.values():
            if not entry.needs_trainer or now - entry.waiting_since <= timeouts.STARVATION_SECONDS:
                continue
            if entry.max_group_size is not None:
                unserved = entry.group_key not in drains_for
            else:
                unserved = (
                    entry.group_key not in served
                    and self.failures_by_group[entry.group_key] < MAX_GROUP_FAILURES
                )
            busy = [view for view in staying if view.lanes and view.draining_for is None]
            if unserved and busy:
                min(busy, key=lambda view: len(view.lanes)).draining_for = entry.group_key
                drains_for.add(entry.group_key)
                served.add(entry.group_key)


def parse_trainer_name(trainer_id: str) -> str:
    """Of a trainer, whose incarnations are name.something."""
    return trainer_id.partition(".")[0]


def _suspects_first(entry: LaneEntry) -> bool:
    return entry.max_group_size is None


def _can_join(entry: LaneEntry, group: Sequence[LaneEntry]) -> bool:
    """Whether the lane may train beside these."""
    most = min(
        (one.max_group_size for one in (*group, entry) if one.max_group_size is not None), default=None
    )
    return most is None or (len(group) < most and all(one.crash_id == entry.crash_id for one in group))
