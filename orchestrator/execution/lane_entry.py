"""The state of one lane between its trials and its trainer, as a state machine without I/O.

    WAITING  -> LEASED      a trainer leases the lane
    LEASED   -> PAUSED      the lane has reported, and its trial has not asked for more (early stopping only)
    PAUSED   -> LEASED      its trial asks for more, or the scheduler stops the lane
    LEASED   -> WAITING     the trainer ended or gave the lane back
    PAUSED   -> RETURNED    the same; if the scheduler has stopped the lane, it becomes WAITING
    RETURNED -> WAITING     its trial asks for more, or the scheduler stops the lane
    WAITING  -> RETURNED    a new trial cancels the stop of the lane
    any      -> ENDED       the lane has a final record, was stopped, or has failed too often

Trials join and leave by name. When the scheduler stops the last trial, the trainer ends the lane early and
writes its record; a lane that no trainer holds is leased once more for this. A lane that lost its trials for
another reason is dropped and forgotten.

A lane whose trainer crashed or hung trains alone until it has a new report or a newer checkpoint, or fails by
itself. A lane has failed after MAX_FAILURES failures. When a trainer crashes that held only this lane, such
crashes count as failures, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import FINAL_STATES, MAX_FAILURES, Record, RecordState
from orchestrator.study.configuration import Configuration

HeldLane = tuple[int, Report | None]
"""A lane as its trainer announces it: attempt, last report of this attempt."""
HeldLanes = Mapping[str, HeldLane]
"""The lanes that a trainer announces, by fingerprint."""


class LeasePhase(StrEnum):
    """The phase of a lane in the broker."""

    WAITING = "waiting"
    """No trainer holds the lane; it may be leased."""
    LEASED = "leased"
    """A trainer holds and trains the lane."""
    PAUSED = "paused"
    """A trainer holds the lane, which has reported and waits until its trial asks for more."""
    RETURNED = "returned"
    """No trainer holds the lane, and its trial has not asked for more."""
    ENDED = "ended"


@dataclass(eq=False)
class LaneEntry:
    """The broker's entry for one fingerprint."""

    configuration: Configuration
    pauses_after_report: bool = False
    """True if a scheduler sees every report before the lane continues."""
    failures: int = 0
    phase: LeasePhase = LeasePhase.WAITING
    trainer: str = ""
    """The trainer that holds the lane; empty if none does."""
    attempt: int = 0
    trials: set[str] = field(default_factory=set)
    reports: list[Report] = field(default_factory=list)
    state: RecordState | None = None
    resume_after_step: int = -1
    """The lane may train beyond reports up to this step. Requests of trials and a stop raise it."""
    stop_step: int | None = None
    """The step of the last report that the scheduler saw before it stopped the lane; None if it did not."""
    last_reported_step: int = 0
    """The step of the holder's last report."""
    alone: bool = False
    """True if no other lane may train beside the lane, because its trainer crashed."""
    crashes_alone: int = 0
    """Crashes of a trainer that held only this lane, since its last new report or newer checkpoint."""
    checkpoint_step: int = 0
    """The step of the lane's newest checkpoint when it was last leased or its trainer last ended."""
    moves_to: str = ""
    """The idle trainer that takes the lane over; empty for none."""

    def __post_init__(self) -> None:
        self.fingerprint, self.group_key = self.configuration.fingerprint, self.configuration.group_key
        self.num_steps = self.configuration.lr_schedule.steps

    # -- trials

    def add_trial(self, trial: str) -> None:
        """Register a trial that wants the lane; this cancels a stop."""
        self.trials.add(trial)
        was_stopped, self.stop_step = self.stop_step is not None, None
        if was_stopped and self.phase is LeasePhase.WAITING:
            self.requeue()

    def next_report(self, after: int) -> Report | RecordState | None:
        """Return the first report after step `after`, else the state in which the lane has ended.

        If neither exists, None is returned, and the lane may train beyond step `after`.
        """
        for report in self.reports:
            if report.step > after:
                return report
        if self.phase is LeasePhase.ENDED:
            return self.state
        self.resume_after_step = max(self.resume_after_step, after)
        if not self._awaits_trial:
            self._resume()
        return None

    @property
    def newest_step(self) -> int:
        """The step of the newest report of any attempt; 0 before the first."""
        return self.reports[-1].step if self.reports else 0

    @property
    def remaining_steps(self) -> int:
        """The steps that are left after the newest report."""
        return self.num_steps - self.newest_step

    @property
    def _awaits_trial(self) -> bool:
        """True if the lane has reported and no trial has asked for the next report."""
        return self.pauses_after_report and bool(self.reports) and self.resume_after_step < self.newest_step

    @property
    def is_wanted(self) -> bool:
        """True if a trial wants the lane, or the lane owes the record of a stop."""
        return bool(self.trials) or self.stop_step is not None

    def stop(self, stop_step: int) -> None:
        """Note that the scheduler stopped the last trial at the report of step `stop_step`."""
        self.stop_step = stop_step
        self.resume_after_step = max(self.resume_after_step, stop_step - 1)
        self._resume()

    def _resume(self) -> None:
        if self.phase is LeasePhase.PAUSED:
            self.phase = LeasePhase.LEASED
        elif self.phase is LeasePhase.RETURNED:
            self.requeue()

    def replay(self, record: Record) -> None:
        """End the lane with a record from the store, and offer its reports to the trials.

        The reports of a stopped record end with the last one that its scheduler saw.
        """
        last = record.steps if record.stopped_at is None else record.stopped_at
        seen = [e for e in record.evaluations if e.split == "validation" and e.step <= last]
        attempt = record.provenance.attempt
        self.reports = [Report(self.fingerprint, attempt, e.step, e.scores) for e in seen]
        self.end(record.state)

    # -- trainers

    def lease(self, trainer: str, attempt: int) -> None:
        """Give a waiting lane to a trainer."""
        self.phase, self.trainer, self.attempt = LeasePhase.LEASED, trainer, attempt
        self.last_reported_step, self.moves_to = 0, ""

    def is_held_by(self, trainer: str, attempt: int) -> bool:
        """Return whether this attempt of this trainer holds the lease."""
        return (self.trainer, self.attempt) == (trainer, attempt)

    def add_report(self, trainer: str, report: Report) -> bool:
        """Take a report of the holder, which may repeat an earlier one.

        A new attempt repeats the reports since its checkpoint; these are not stored again.

        Returns:
            True if the report is newer than all earlier reports.
        """
        if not self.is_held_by(trainer, report.attempt):
            return False
        self.last_reported_step = report.step
        newer = not self.reports or report.step > self.newest_step
        if newer:
            self.reports.append(replace(report, curve=()))  # the driver has the curve; no trial reads it
            self.alone, self.crashes_alone = False, 0
        if self.pauses_after_report and self.resume_after_step < report.step:
            self.phase = LeasePhase.PAUSED
        return newer

    def directive(self, trainer: str, attempt: int, drains: bool) -> Directive:
        """Return what the trainer should do with the lane now.

        A lane that is to be stopped continues until it has reported everything that the scheduler saw,
        because the record must contain these reports.

        Args:
            trainer: The trainer.
            attempt: The attempt of its lane.
            drains: True if the trainer shall give back all lanes.
        """
        if not (self.is_held_by(trainer, attempt) and self.is_wanted):
            return Directive.DROP
        if self.stop_step is not None and self.last_reported_step >= self.stop_step:
            return Directive.STOP
        if drains or self.moves_to:
            return Directive.YIELD
        return Directive.PARK if self.phase is LeasePhase.PAUSED else Directive.CONTINUE

    def note_checkpoint(self, step: int) -> bool:
        """Note the step of the lane's newest checkpoint, before a lease or after its trainer ended.

        Returns:
            True if the lane got further than before; its earlier crashes then no longer count.
        """
        further = step > self.checkpoint_step
        if further:
            self.checkpoint_step, self.alone, self.crashes_alone = step, False, 0
        return further

    def note_crash(self, was_only_lane: bool) -> bool:
        """Note that the lane's trainer crashed.

        Returns:
            True if the lane has failed: its crashes and failures reach MAX_FAILURES.
        """
        self.alone = True
        self.crashes_alone += was_only_lane
        return was_only_lane and self.crashes_alone + self.failures >= MAX_FAILURES

    def end_lease(self, trainer: str, attempt: int, state: RecordState) -> None:
        """Note how the lane ended on a trainer.

        A final state counts from any trainer. Other states count only from the holder of the lease.
        """
        if state in FINAL_STATES:
            self.end(state)
        elif self.is_held_by(trainer, attempt):
            self.alone = False
            self.failures += state == "failed"
            if self.failures >= MAX_FAILURES if state == "failed" else not self.trials:
                self.end(state)
            else:
                self.requeue()

    def requeue(self) -> None:
        """Take the lane off its trainer and queue it again; a paused lane first waits for its trial."""
        held_back = self._awaits_trial and self.stop_step is None
        self.phase = LeasePhase.RETURNED if held_back else LeasePhase.WAITING
        self.trainer = ""

    def end(self, state: RecordState) -> None:
        """End the lane in the state of the record that counts."""
        self.phase, self.trainer, self.state = LeasePhase.ENDED, "", state
