"""The life of one lane between its trials and its trainer: a plain state machine.

    waiting --lease--> leased --report--> parked --a trial asks on--> leased --done--> ended
       ^  ^              |                  |
       |  +--------------+------------------+   the trainer died, failed or left, or it was stopped and is wanted
       |                                    |
       +---------a trial asks on-------- spilled   its trainer needed the place (or died); a checkpoint is left

Trials come and go by name. A lane that a scheduler has stopped is let go: whoever holds it ends it early and
records that; where nobody does, it is leased once more for that. One that nobody wants for another reason is
dropped and forgotten. All answers are computed from the state, so that asking twice (a lost reply, a
restarted caller) does no harm.

A lane whose trainer crashed is suspected of it: it trains in company of half as many, and so on until it is
alone or has a new report to show. One that crashes its trainer alone, time and again, has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import nan

from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import MAX_FAILURES, Record, RecordState


class LeasePhase(StrEnum):
    WAITING = "waiting"
    LEASED = "leased"
    PAUSED = "paused"
    RETURNED = "returned"
    ENDED = "ended"


@dataclass
class LaneEntry:
    """One fingerprint. `gated`: after a report the lane waits until a trial asks for the next one."""

    fingerprint: str
    group_key: str
    waiting_since: float
    """When it began to wait, on the broker's clock (seconds)."""
    pauses_after_report: bool = False
    phase: LeasePhase = LeasePhase.WAITING
    trainer_id: str = ""
    attempt: int = 0
    trials: set[str] = field(default_factory=set)
    reports: list[Report] = field(default_factory=list)
    state: RecordState | None = None
    failures: int = 0
    resume_after_step: int = -1
    """The last step beyond which a trial has asked to go on."""
    is_stopped: bool = False
    """A scheduler has stopped it, and its record is owed."""
    stop_step: int = 0
    """Up to which step that scheduler had seen it."""
    last_reported_step: int = 0
    """The step of its holder's last report."""
    orphan_until: float = 0.0
    crash_id: int = 0
    """The last crash of which it was suspected; 0 before the first."""
    max_group_size: int | None = None
    """While it is suspected: how many lanes may be in its lane group, it among them."""
    solo_crashes: int = 0
    """How often its trainer crashed while it was alone there, since it had news or a newer checkpoint."""
    checkpoint_step: int = 0
    """The step of its newest checkpoint when its trainer last died."""

    # -- trials -----------------------------------------------------------------------------------------

    def add_trial(self, trial: str, now: float) -> None:
        self.trials.add(trial)
        if self.is_stopped:
            self.is_stopped = False
            if self.phase is LeasePhase.WAITING:
                self.requeue(now)

    def next_report(self, after: int, now: float) -> Report | RecordState | None:
        """The first report beyond step `after`, else how the lane ended, else None (not yet)."""
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
        """Whether it has reported what no trial has asked beyond."""
        return (
            self.pauses_after_report and bool(self.reports) and self.resume_after_step < self.reports[-1].step
        )

    def is_wanted(self, now: float) -> bool:
        return bool(self.trials) or now < self.orphan_until

    def stop(self, stop_step: int, now: float) -> None:
        """Its last trial was stopped by the scheduler, at the report of step `seen`."""
        self.is_stopped, self.stop_step, self.orphan_until = True, stop_step, 0.0
        self.resume_after_step = max(self.resume_after_step, stop_step - 1)
        if self.phase is LeasePhase.PAUSED and self.last_reported_step < stop_step:
            self.phase = LeasePhase.LEASED
        elif self.phase is LeasePhase.RETURNED:
            self.requeue(now)

    @property
    def needs_trainer(self) -> bool:
        return self.phase is LeasePhase.WAITING and (bool(self.trials) or self.is_stopped)

    def replay(self, record: Record) -> None:
        """What is known of it already ends it at once; its trial hears of it as if it trained, up to where
        the scheduler that stopped it saw it."""
        last = record.steps if record.stopped_at is None else record.stopped_at
        losses, attempt = {step.step: step.loss for step in record.curve}, record.provenance.attempt
        self.reports = [
            Report(self.fingerprint, attempt, e.step, e.scores, losses.get(e.step, nan))
            for e in record.evaluations
            if e.split == "validation" and e.step <= last
        ]
        self._end(record.state)

    # -- trainers ------------------------------------------------------------------------------------------

    def lease(self, trainer_id: str, attempt: int) -> None:
        assert self.phase is LeasePhase.WAITING, (
            f"{self.fingerprint[:12]} is {self.phase}, only a waiting lane is leased"
        )
        self.phase, self.trainer_id, self.attempt, self.last_reported_step = (
            LeasePhase.LEASED,
            trainer_id,
            attempt,
            0,
        )

    def is_held_by(self, trainer_id: str, attempt: int) -> bool:
        return self.phase in (LeasePhase.LEASED, LeasePhase.PAUSED) and (self.trainer_id, self.attempt) == (
            trainer_id,
            attempt,
        )

    def add_report(self, trainer_id: str, report: Report) -> bool:
        """The last report of who holds it, perhaps said before. One that is not newer than what is kept (a
        new attempt repeats some) is not kept. Returns whether it is."""
        if not self.is_held_by(trainer_id, report.attempt):
            return False
        self.last_reported_step = report.step
        newer = not self.reports or report.step > self.reports[-1].step
        if newer:
            self.reports.append(report)
            self.clear_suspicion()
        if self.pauses_after_report and self.resume_after_step < report.step:
            self.phase = LeasePhase.PAUSED
        return newer

    def directive(self, trainer_id: str, attempt: int, now: float) -> Directive:
        """What the trainer should do with the lane at this moment. One that is to be stopped first tells again
        all that the scheduler has seen: its record says so."""
        if not self.is_held_by(trainer_id, attempt):
            return Directive.DROP
        if not self.is_wanted(now):
            if self.is_stopped:
                return Directive.STOP if self.last_reported_step >= self.stop_step else Directive.CONTINUE
            return Directive.DROP
        return Directive.PARK if self.phase is LeasePhase.PAUSED else Directive.CONTINUE

    def update_checkpoint_step(self, checkpoint_step: int) -> bool:
        """Its trainer has died, and its newest checkpoint is of step `saved`. Returns whether it has got further
        since the last time: then it may crash as often as before."""
        further = checkpoint_step > self.checkpoint_step
        if further:
            self.checkpoint_step, self.solo_crashes = checkpoint_step, 0
        return further

    def mark_suspect(self, crash_id: int, group_size: int, is_proof: bool = True) -> None:
        """Its trainer crashed while it held so many lanes, this one among them. `counts`: for a lone one it is a
        proof."""
        self.crash_id, self.max_group_size = crash_id, max(1, group_size // 2)
        self.solo_crashes += is_proof and group_size == 1

    @property
    def is_faulty(self) -> bool:
        return self.solo_crashes > 0 and self.solo_crashes + self.failures >= MAX_FAILURES

    def clear_suspicion(self) -> None:
        self.max_group_size, self.solo_crashes = None, 0

    def abandon(self, state: RecordState) -> None:
        """It is not tried again: it has failed, or somebody's record says how it ended before."""
        self._end(state)

    def end_lease(self, trainer_id: str, attempt: int, state: RecordState, now: float) -> None:
        """The trainer says how it ended. A final record counts whoever wrote it; the rest needs the lease."""
        if self.phase is LeasePhase.ENDED:
            return
        if state in ("finished", "diverged"):
            self._end(state)
        elif self.is_held_by(trainer_id, attempt):
            self.max_group_size = None
            if state == "failed":
                self.failures += 1
                if self.failures >= MAX_FAILURES:
                    self._end("failed")
                    return
            elif not self.is_wanted(now):
                self._end("stopped")
                return
            self.requeue(now)

    def requeue(self, now: float) -> None:
        """Off its trainer, which died or needs the place, or its end was not the end. Back to the queue, unless
        its trial has yet to ask on."""
        if self.phase is not LeasePhase.ENDED:
            held_back = self._awaits_trial and not self.is_stopped
            self.phase = LeasePhase.RETURNED if held_back else LeasePhase.WAITING
            self.trainer_id, self.waiting_since = "", now

    def _end(self, state: RecordState) -> None:
        self.phase, self.trainer_id, self.state, self.max_group_size = LeasePhase.ENDED, "", state, None
