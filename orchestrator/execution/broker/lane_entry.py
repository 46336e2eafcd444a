"""The state of one lane between its trials and its trainer, as a state machine without I/O.

    WAITING  -> LEASED      a trainer leases the lane
    LEASED   -> PAUSED      the lane has reported, and its trial has not asked for more (early stopping only)
    PAUSED   -> LEASED      its trial asks for more, or the scheduler stopped it at a later report
    LEASED   -> WAITING     the trainer ended or gave the lane back
    PAUSED   -> RETURNED    the same; if the scheduler has stopped the lane, it becomes WAITING
    RETURNED -> WAITING     its trial asks for more, or the scheduler stops the lane
    any      -> ENDED       the lane has a final record, was stopped, or has failed too often

Trials join and leave by name. When the scheduler stops the last trial, the trainer ends the lane early and
writes its record; a lane that no trainer holds is leased once more for this. A lane that lost its trials for
another reason is dropped and forgotten. Every answer depends on the state alone, so a repeated call is
harmless.

A lane whose trainer crashed is a suspect: it trains in a lane group of half the size, then of a quarter,
until it is alone or has a new report. A lane that crashes trainers repeatedly while it trains alone is faulty
and fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import FINAL_STATES, MAX_FAILURES, Record, RecordState
from orchestrator.study.configuration import Configuration

HeldLane = tuple[int, Configuration, Report | None]
"""A lane as its trainer announces it: attempt, configuration, last report of this attempt."""
HeldLanes = Mapping[str, HeldLane]
"""The lanes that a trainer announces, by fingerprint."""


class TrainerInfo(NamedTuple):
    """The devices and the limit of a trainer, which it sends with every call of `lease` and `exchange`."""

    devices: tuple[str, ...] = ()
    """The names of the devices of its workers."""
    max_lanes: int = 0
    """The number of lanes that it can hold at once, of the group key that it trains; 0 if it is unknown."""


NO_INFO = TrainerInfo()


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


@dataclass
class LaneEntry:
    """The broker's entry for one fingerprint."""

    fingerprint: str
    group_key: str
    waiting_since: float
    """Start of the wait for a trainer, in seconds on the broker's clock."""
    pauses_after_report: bool = False
    """True if a scheduler sees every report before the lane continues."""
    phase: LeasePhase = LeasePhase.WAITING
    trainer_id: str = ""
    attempt: int = 0
    trials: set[str] = field(default_factory=set)
    reports: list[Report] = field(default_factory=list)
    state: RecordState | None = None
    failures: int = 0
    resume_after_step: int = -1
    """The last step after which a trial has asked for the next report."""
    is_stopped: bool = False
    """True if a scheduler has stopped the lane and the lane's record is not written yet."""
    stop_step: int = 0
    """The step of the last report that the scheduler saw before it stopped the lane."""
    last_reported_step: int = 0
    """The step of the holder's last report."""
    orphan_until: float = 0.0
    """Time until which the lane is kept without a trial, on the broker's clock."""
    crash_id: int = 0
    """Number of the last crash that the lane is suspected of; 0 before the first crash."""
    max_group_size: int | None = None
    """The largest lane group that a suspect may train in, including itself; None if the lane is no
    suspect."""
    solo_crashes: int = 0
    """Crashes of a trainer that held only this lane, since its last new report or checkpoint."""
    checkpoint_step: int = 0
    """The step of the lane's newest checkpoint when its trainer last died."""

    # -- trials

    def add_trial(self, trial: str, now: float) -> None:
        """Register a trial that wants the lane; this cancels a stop."""
        self.trials.add(trial)
        if self.is_stopped:
            self.is_stopped = False
            if self.phase is LeasePhase.WAITING:
                self.requeue(now)

    def next_report(self, after: int, now: float) -> Report | RecordState | None:
        """Return the first report after step `after`, or the final state of a lane without one.

        If neither exists, None is returned, and the lane may train beyond step `after`.
        """
        for report in self.reports:
            if report.step > after:
                return report
        if self.phase is LeasePhase.ENDED:
            return self.state
        self.resume_after_step = max(self.resume_after_step, after)
        if not self._awaits_trial:
            if self.phase is LeasePhase.PAUSED:
                self.phase = LeasePhase.LEASED
            elif self.phase is LeasePhase.RETURNED:
                self.requeue(now)
        return None

    @property
    def _awaits_trial(self) -> bool:
        """True if the lane has reported and no trial has asked for the next report."""
        last_step = self.reports[-1].step if self.reports else -1
        return self.pauses_after_report and self.resume_after_step < last_step

    def is_wanted(self, now: float) -> bool:
        """Return whether a trial wants the lane, or may still claim it after a restart of the broker."""
        return bool(self.trials) or now < self.orphan_until

    def stop(self, stop_step: int, now: float) -> None:
        """Note that the scheduler stopped the last trial at the report of step `stop_step`."""
        self.is_stopped, self.stop_step, self.orphan_until = True, stop_step, 0.0
        self.resume_after_step = max(self.resume_after_step, stop_step - 1)
        if self.phase is LeasePhase.PAUSED and self.last_reported_step < stop_step:
            self.phase = LeasePhase.LEASED
        elif self.phase is LeasePhase.RETURNED:
            self.requeue(now)

    @property
    def needs_trainer(self) -> bool:
        """True if the lane should be leased."""
        return self.phase is LeasePhase.WAITING and (bool(self.trials) or self.is_stopped)

    def replay(self, record: Record) -> None:
        """End the lane with a record from the store, and offer its reports to the trials.

        The reports of a stopped record end with the last one that its scheduler saw.
        """
        last = record.steps if record.stopped_at is None else record.stopped_at
        self.reports = [
            Report(self.fingerprint, record.provenance.attempt, e.step, e.scores)
            for e in record.evaluations
            if e.split == "validation" and e.step <= last
        ]
        self.end(record.state)

    # -- trainers

    def lease(self, trainer_id: str, attempt: int) -> None:
        """Give a waiting lane to a trainer."""
        assert self.phase is LeasePhase.WAITING, f"{self.fingerprint[:12]} is {self.phase}, not waiting"
        self.phase, self.trainer_id, self.attempt = LeasePhase.LEASED, trainer_id, attempt
        self.last_reported_step = 0

    def is_held_by(self, trainer_id: str, attempt: int) -> bool:
        """Return whether this attempt of this trainer holds the lease."""
        is_leased = self.phase in (LeasePhase.LEASED, LeasePhase.PAUSED)
        return is_leased and (self.trainer_id, self.attempt) == (trainer_id, attempt)

    def add_report(self, trainer_id: str, report: Report) -> bool:
        """Take a report of the holder, which may repeat an earlier one.

        A new attempt repeats the reports since its checkpoint; these are not stored again.

        Returns:
            True if the report is newer than all earlier reports.
        """
        if not self.is_held_by(trainer_id, report.attempt):
            return False
        self.last_reported_step = report.step
        newer = not self.reports or report.step > self.reports[-1].step
        if newer:
            self.reports.append(replace(report, curve=()))  # the driver has the curve; no trial reads it
            self.max_group_size, self.solo_crashes = None, 0
        if self.pauses_after_report and self.resume_after_step < report.step:
            self.phase = LeasePhase.PAUSED
        return newer

    def directive(self, trainer_id: str, attempt: int, now: float) -> Directive:
        """Return what the trainer should do with the lane now.

        A lane that is to be stopped continues until it has reported everything that the scheduler saw,
        because the record must contain these reports.
        """
        if not self.is_held_by(trainer_id, attempt):
            return Directive.DROP
        if not self.is_wanted(now):
            if self.is_stopped:
                return Directive.STOP if self.last_reported_step >= self.stop_step else Directive.CONTINUE
            return Directive.DROP
        return Directive.PARK if self.phase is LeasePhase.PAUSED else Directive.CONTINUE

    def update_checkpoint_step(self, checkpoint_step: int) -> bool:
        """Note the lane's newest checkpoint after its trainer died.

        Returns:
            True if the lane got further than before; its earlier crashes then no longer count.
        """
        further = checkpoint_step > self.checkpoint_step
        if further:
            self.checkpoint_step, self.solo_crashes = checkpoint_step, 0
        return further

    def mark_suspect(self, crash_id: int, group_size: int, is_proof: bool = True) -> None:
        """Suspect the lane of having caused a crash of its trainer.

        Args:
            crash_id: Number of the crash, shared by all its suspects.
            group_size: Number of lanes that the trainer held.
            is_proof: True if the crash proves the lane faulty, provided that the lane trained alone.
        """
        self.crash_id, self.max_group_size = crash_id, max(1, group_size // 2)
        self.solo_crashes += is_proof and group_size == 1

    @property
    def is_faulty(self) -> bool:
        """True if trainers died with this lane alone, and deaths and failures reach MAX_FAILURES."""
        return self.solo_crashes > 0 and self.solo_crashes + self.failures >= MAX_FAILURES

    def end_lease(self, trainer_id: str, attempt: int, state: RecordState, now: float) -> None:
        """Note how the lane ended on a trainer.

        A final state counts from any trainer. Other states count only from the holder of the lease.
        """
        if self.phase is LeasePhase.ENDED:
            return
        if state in FINAL_STATES:
            self.end(state)
        elif self.is_held_by(trainer_id, attempt):
            self.max_group_size = None
            if state == "failed":
                self.failures += 1
                if self.failures >= MAX_FAILURES:
                    self.end("failed")
                    return
            elif not self.is_wanted(now):
                self.end("stopped")
                return
            self.requeue(now)

    def requeue(self, now: float) -> None:
        """Take the lane off its trainer and queue it again; a paused lane first waits for its trial."""
        if self.phase is not LeasePhase.ENDED:
            held_back = self._awaits_trial and not self.is_stopped
            self.phase = LeasePhase.RETURNED if held_back else LeasePhase.WAITING
            self.trainer_id, self.waiting_since = "", now

    def end(self, state: RecordState) -> None:
        """End the lane in the state of the record that counts."""
        self.phase, self.trainer_id, self.state, self.max_group_size = LeasePhase.ENDED, "", state, None
