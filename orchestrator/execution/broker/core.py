"""The broker's decisions about trainers and lanes, as a state machine without I/O.

Lanes are keyed by fingerprint, trainers by incarnation: a new process is a new trainer. Time is an argument
of every method. The records in the store are authoritative, not this state: after a restart of the broker,
trials submit again and trainers announce the lanes that they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from orchestrator.execution.broker.assignment import (
    MAX_GROUP_FAILURES,
    TrainerView,
    assign_starved_groups,
    can_join,
    choose_group_key,
    groups_in_training,
    parse_trainer_name,
    select_lanes,
)
from orchestrator.execution.broker.failure_policy import ExitKind, FailurePolicy
from orchestrator.execution.broker.lane_entry import HeldLanes, LaneEntry, LeasePhase
from orchestrator.execution.rungs import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report
from orchestrator.record.schema import LaneProgress, Record, RecordState
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts


class BrokerCore:
    """Match waiting lanes with trainers and keep the state of both.

    Args:
        newest_attempt: Returns the highest attempt of a fingerprint that has left checkpoints. The next lease
            gets a higher number, so that each attempt has a checkpoint folder of its own.
        count_failures: Returns how often a fingerprint has failed according to the store.
        find_record: Returns the record that answers a request for a configuration, if there is one.
        scheduler: The study's early stopping. With any, lanes pause after each report.
        write_failure: Writes the record of a faulty lane, with the given reason. Returns the state of the
            record that counts.
        checkpoint_step: Returns the step of a fingerprint's newest checkpoint, 0 without one.
    """

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
        self.newest_attempt, self.count_failures = newest_attempt, count_failures
        self.find_record = find_record
        self.scheduler, self.write_failure, self.checkpoint_step = scheduler, write_failure, checkpoint_step
        self.entries: dict[str, LaneEntry] = {}
        self.open_entries: dict[str, LaneEntry] = {}
        """The entries that have not ended. Every lease iterates over them, so they must not grow with the
        study."""
        self.configurations: dict[str, Configuration] = {}
        self.trainers: dict[str, TrainerView] = {}
        self.ended_lanes: list[tuple[str, RecordState]] = []
        """Every lane that ended, in order; the driver reads from its last position on."""
        self.progress: list[LaneProgress] = []
        """The starts and new reports of all lanes, in order; the driver reads from its last position on."""
        self.steps_taken: dict[str, int] = {}
        """Optimizer steps of every trainer, including trainers that have ended."""
        self.closed = False
        """True once no more lanes will be submitted."""
        self.draining: set[str | None] = set()
        """Names of trainers that must return their lanes and end; None stands for all trainers."""
        self.num_crashes = 0
        self.failure_policy = FailurePolicy()
        self.failures_by_group: Counter[str] = Counter()
        """Failures in a row of the lanes of a group key, and crashes of their trainers."""
        self.silent_since: dict[str, float] = {}
        """Time at which a trainer that is still silent was taken for dead, by name."""

    # -- trials

    def submit(self, trial: str, configuration: Configuration, now: float) -> None:
        """Register a trial for a configuration.

        The trial joins the lane if the lane is in training, and gets the reports of the record if one exists.
        """
        self._entry_for(configuration, now).add_trial(trial, now)

    def next_report(self, fingerprint: str, after: int, now: float) -> Report | RecordState | None:
        """Return the next report or final state of a lane; see `LaneEntry.next_report`.

        Raises:
            KeyError: The lane is unknown because the broker restarted; the trial has to submit again.
        """
        return self.entries[fingerprint].next_report(after, now)

    def release(self, trial: str) -> None:
        """Remove a trial that the scheduler did not stop.

        Its lane is dropped unless another trial wants it.
        """
        for fingerprint in [f for f, entry in self.open_entries.items() if trial in entry.trials]:
            self.open_entries[fingerprint].trials.discard(trial)
            self._discard_unwanted(fingerprint)

    def stop(self, trial: str, configuration: Configuration, stop_step: int, now: float) -> None:
        """Remove a trial that the scheduler stopped at the report of step `stop_step`.

        Unless another trial wants the lane, it ends early with a record, even if no trainer holds it or the
        broker has restarted and does not know it.
        """
        entry = self._entry_for(configuration, now)
        entry.trials.discard(trial)
        if not entry.trials:
            entry.stop(stop_step, now)

    # -- trainers

    def lease(self, trainer_id: str, group_key: str | None, capacity: int, now: float) -> LeaseGrant:
        """Return lanes for a trainer that has just announced the lanes that it holds, by `exchange`.

        Args:
            trainer_id: The trainer's name and incarnation.
            group_key: The group key of the trainer's lane group. None allows any group key: the group is
                empty, or all of its lanes have been paused for long.
            capacity: The largest number of lanes to return.
            now: Time on the broker's clock.
        """
        view = self._update_contact(trainer_id, now)
        if self.must_drain(trainer_id):
            return LeaseGrant(closed=True)
        if group_key is not None or not view.lanes:
            view.group_key = group_key
        staying = [view for t, view in self.trainers.items() if not self.must_drain(t)]
        assign_starved_groups(self.open_entries.values(), staying, self.failures_by_group, now)
        waiting = [entry for entry in self.open_entries.values() if entry.needs_trainer]
        group = self._entries_held_by(trainer_id)
        joined = group
        if group_key is None:
            joined = []
            group_key, view.draining_for = choose_group_key(view, waiting, self.failures_by_group), None
        elif view.draining_for is not None:
            return LeaseGrant()
        selected = select_lanes(waiting, group_key, joined, capacity)
        return LeaseGrant(
            tuple(self._lease_entry(entry, trainer_id, view, now) for entry in selected),
            closed=self.closed and not waiting,
            requires_empty_group=not all(can_join(entry, group) for entry in selected),
        )

    def _lease_entry(self, entry: LaneEntry, trainer_id: str, view: TrainerView, now: float) -> Lease:
        attempt = max(entry.attempt, self.newest_attempt(entry.fingerprint)) + 1
        entry.lease(trainer_id, attempt)
        view.group_key, view.leased_at = entry.group_key, now
        view.lanes.add(entry.fingerprint)
        configuration = self.configurations[entry.fingerprint]
        self.progress.append(LaneProgress(configuration))
        return Lease(configuration, attempt, scheduler_settings(self.scheduler, configuration))

    def heartbeat(self, trainer_id: str, now: float) -> None:
        """Note that a trainer is alive although its loop makes no calls."""
        self.silent_since.pop(parse_trainer_name(trainer_id), None)
        if trainer_id in self.trainers:
            self.trainers[trainer_id].last_contact = now

    def exchange(self, trainer_id: str, held: HeldLanes, steps: int, now: float) -> dict[str, Directive]:
        """Take a trainer's reports and return the directives for its lanes, by fingerprint.

        A lane that the trainer should hold and does not announce has never reached it, and returns to the
        queue. The trainer keeps a lane that it announces and that no other trainer has leased meanwhile: the
        broker may have restarted, or have taken the trainer for dead.

        Args:
            trainer_id: The trainer's name and incarnation.
            held: All lanes that the trainer holds, by fingerprint.
            steps: The trainer's optimizer steps so far; see `LaneSource`.
            now: Time on the broker's clock.
        """
        view = self._update_contact(trainer_id, now)
        if steps > self.steps_taken.setdefault(trainer_id, 0):
            self.failure_policy.on_step(parse_trainer_name(trainer_id), steps)
            self.steps_taken[trainer_id] = steps
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
                self.progress.append(LaneProgress(configuration, report.step, report.scores, report.curve))
        for fingerprint in view.lanes - set(held):
            view.lanes.discard(fingerprint)
            self._requeue_lost(trainer_id, fingerprint, now)
        directives = {
            f: self.entries[f].directive(trainer_id, attempt, now) for f, (attempt, _, _) in held.items()
        }
        if self.must_drain(trainer_id):
            directives |= {
                f: Directive.YIELD for f, a in directives.items() if a in (Directive.CONTINUE, Directive.PARK)
            }
        return directives

    def return_lease(self, trainer_id: str, fingerprint: str, attempt: int, now: float) -> None:
        """Requeue a lane that its trainer has given back; see `LaneSource.return_lease`."""
        view = self._update_contact(trainer_id, now)
        entry = self.entries.get(fingerprint)
        if entry is not None and entry.is_held_by(trainer_id, attempt):
            view.lanes.discard(fingerprint)
            entry.requeue(now)
            self._discard_unwanted(fingerprint)

    def end_lease(
        self, trainer_id: str, fingerprint: str, attempt: int, state: RecordState, now: float
    ) -> None:
        """Note how a lane has ended on a trainer; its record, if any, is in the store."""
        view = self._update_contact(trainer_id, now)
        entry = self.entries.get(fingerprint)
        if entry is None or not (entry.trainer_id == trainer_id and entry.attempt != attempt):
            view.lanes.discard(fingerprint)  # otherwise the trainer has leased the lane again meanwhile
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
        """Make trainers save their lanes, give them back and end.

        A broker that restarts has to be told again.

        Args:
            trainer_name: The trainer, in all present and future incarnations; None for all trainers.
        """
        self.draining.add(trainer_name)

    def trainer_exited(self, trainer_name: str, now: float, exit_kind: ExitKind, reason: str = "") -> None:
        """Remove all incarnations of a trainer that has ended, and count its failure.

        Args:
            trainer_name: The trainer's name.
            now: Time on the broker's clock.
            exit_kind: The reason for the end.
            reason: The reason in one line, for the record of a faulty lane.
        """
        self.silent_since.pop(trainer_name, None)
        trainer_ids = [t for t in self.trainers if parse_trainer_name(t) == trainer_name]
        trained = groups_in_training(self.trainers, self.steps_taken, trainer_ids)
        is_lane_suspect = exit_kind not in (ExitKind.CRASHED, ExitKind.FAILED) or any(
            entry.max_group_size is not None
            or (self.failures_by_group[entry.group_key] and entry.group_key not in trained)
            for trainer_id in trainer_ids
            for entry in self._entries_held_by(trainer_id)
        )
        narrowed = [self.remove_trainer(t, now, exit_kind, reason) for t in trainer_ids]
        no_fault = (ExitKind.DONE, ExitKind.PLACEMENT_TIMEOUT, ExitKind.NODE_LOST)
        other_keys_left = exit_kind is ExitKind.REPEATED_LANE_FAILURES and any(
            self.failures_by_group[entry.group_key] < MAX_GROUP_FAILURES
            for entry in self.open_entries.values()
        )
        is_failure = exit_kind not in no_fault and not any(narrowed) and not other_keys_left
        steps = [n for t, n in self.steps_taken.items() if parse_trainer_name(t) == trainer_name]
        self.failure_policy.on_exit(trainer_name, max(steps, default=0), is_failure, is_lane_suspect)

    def remove_trainer(
        self, trainer_id: str, now: float, exit_kind: ExitKind = ExitKind.DONE, reason: str = ""
    ) -> bool:
        """Requeue the lanes of a trainer that has ended; after a crash they are suspects.

        Returns:
            True if the end narrows down the faulty lane.
        """
        held = self._entries_held_by(trainer_id)
        self.trainers.pop(trainer_id, None)
        crashed = exit_kind is ExitKind.CRASHED
        suspicious = crashed or exit_kind is ExitKind.OUT_OF_MEMORY
        if held and exit_kind not in (ExitKind.DONE, ExitKind.NODE_LOST):
            got_further = [e.update_checkpoint_step(self.checkpoint_step(e.fingerprint)) for e in held]
            if any(got_further):
                self.failure_policy.on_progress()
            self.failures_by_group[held[0].group_key] += crashed
        self.num_crashes += suspicious
        for entry in held:
            if suspicious:
                entry.mark_suspect(self.num_crashes, len(held), is_proof=crashed)
            if crashed and entry.is_faulty:
                cause = reason or "no reason is known"
                why = f"the trainer's process died while the lane trained alone: {cause}"
                state = self.write_failure(entry, self.configurations[entry.fingerprint], why)
                self.failure_policy.on_faulty_lane()
                entry.end(state)
                self._close_entry(entry.fingerprint, state)
            else:
                self._requeue_lost(trainer_id, entry.fingerprint, now)
        return len(held) > 1 if exit_kind is ExitKind.OUT_OF_MEMORY else crashed and bool(held)

    def tick(self, now: float) -> None:
        """Take trainers for dead that have been silent for too long. The driver calls this regularly."""
        for trainer_id, view in list(self.trainers.items()):
            if now - view.last_contact > timeouts.TRAINER_SILENT_SECONDS:
                self.silent_since.setdefault(parse_trainer_name(trainer_id), now)
                self.remove_trainer(trainer_id, now)

    def hung_trainers(self, now: float) -> list[str]:
        """Return the names of trainers that were taken for dead and have been silent for as long again.

        Such trainers occupy their place for nothing. The second wait protects against a pause of the broker
        itself, because living trainers call the broker in the meantime.
        """
        limit = timeouts.TRAINER_SILENT_SECONDS
        return [name for name, since in self.silent_since.items() if now - since > limit]

    # -- the driver

    def counts(self) -> Counter[str]:
        """Return the number of lanes in each phase, and of "trainers"."""
        counts = Counter(str(entry.phase) for entry in self.open_entries.values())
        counts["ended"] = len(self.entries) - len(self.open_entries)
        counts["trainers"] = len(self.trainers)
        return counts

    # -- helpers

    def _entries_held_by(self, trainer_id: str) -> list[LaneEntry]:
        lanes = self.trainers[trainer_id].lanes if trainer_id in self.trainers else ()
        held = (self.entries.get(fingerprint) for fingerprint in sorted(lanes))
        return [entry for entry in held if entry is not None and entry.trainer_id == trainer_id]

    def must_drain(self, trainer_id: str) -> bool:
        """Return whether a trainer must return its lanes and end."""
        return not self.draining.isdisjoint((None, parse_trainer_name(trainer_id)))

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
        """Return the entry for `configuration`, created with the store's failure count and record."""
        fingerprint = configuration.fingerprint
        if fingerprint not in self.entries:
            entry = LaneEntry(fingerprint, configuration.group_key, now, self.scheduler != "none")
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
        """Forget a lane that no trainer holds and no trial wants.

        A trainer that holds such a lane gets DROP as its next directive.
        """
        entry = self.entries[fingerprint]
        is_unheld = entry.phase in (LeasePhase.WAITING, LeasePhase.RETURNED)
        if is_unheld and not entry.trials and not entry.is_stopped:
            del self.entries[fingerprint], self.open_entries[fingerprint], self.configurations[fingerprint]
