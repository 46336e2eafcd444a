"""The life of one lane between its trials and its seat: a plain state machine.

    waiting --lease--> leased --report--> parked --a trial asks on--> leased --done--> ended
       ^  ^              |                  |
       |  +--------------+------------------+   the seat died, failed or left, or it was stopped and is wanted
       |                                    |
       +---------a trial asks on-------- spilled   its seat needed the place (or died); a checkpoint is left

Trials come and go by name. A lane that a scheduler has stopped is let go: whoever holds it ends it early and
records that; where nobody does, it is leased once more for that. One that nobody wants for another reason is
dropped and forgotten. All answers are computed from the state, so that asking twice (a lost reply, a
restarted caller) does no harm.

A lane whose seat crashed is suspected of it: it trains in company of half as many, and so on until it is
alone or has a new report to show. One that crashes its seat alone, time and again, has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import nan

from orchestrator.finetune.engine.lane_source import Answer, Report
from orchestrator.record.schema import FAILURES_ALLOWED, Record, State

ORPHAN_SECONDS = 60.0  # how long a lane announced by a seat waits for its trial after the broker restarted


class Phase(StrEnum):
    WAITING = "waiting"
    LEASED = "leased"
    PARKED = "parked"
    SPILLED = "spilled"
    ENDED = "ended"


@dataclass
class Life:
    """One fingerprint. `gated`: after a report the lane waits until a trial asks for the next one."""

    fingerprint: str
    shape: str
    since: float
    """When it began to wait, on the broker's clock (seconds)."""
    gated: bool = False
    phase: Phase = Phase.WAITING
    seat: str = ""
    attempt: int = 0
    trials: set[str] = field(default_factory=set)
    reports: list[Report] = field(default_factory=list)
    state: State | None = None
    failures: int = 0
    asked: int = -1
    """The last step beyond which a trial has asked to go on."""
    let_go: bool = False
    """A scheduler has stopped it, and its record is owed."""
    seen: int = 0
    """Up to which step that scheduler had seen it."""
    told: int = 0
    """The step of its holder's last report."""
    orphan_until: float = 0.0
    case: int = 0
    """The last crash of which it was suspected; 0 before the first."""
    company: int | None = None
    """While it is suspected: how many lanes may be in its pack, it among them."""
    crashes: int = 0
    """How often its seat crashed while it was alone there, since it had news or a newer checkpoint."""
    saved: int = 0
    """The step of its newest checkpoint when its seat last died."""

    # -- trials -----------------------------------------------------------------------------------------

    def want(self, trial: str, now: float) -> None:
        self.trials.add(trial)
        if self.let_go:
            self.let_go = False
            if self.phase is Phase.WAITING:
                self.wait(now)

    def ask(self, after: int, now: float) -> Report | State | None:
        """The first report beyond step `after`, else how the lane ended, else None (not yet)."""
        for report in self.reports:
            if report.step > after:
                return report
        if self.phase is Phase.ENDED:
            return self.state
        self.asked = max(self.asked, after)
        if not self._held_back:
            if self.phase is Phase.PARKED:
                self.phase = Phase.LEASED
            elif self.phase is Phase.SPILLED:
                self.wait(now)
        return None

    @property
    def _held_back(self) -> bool:
        """Whether it has reported what no trial has asked beyond."""
        return self.gated and bool(self.reports) and self.asked < self.reports[-1].step

    def wanted(self, now: float) -> bool:
        return bool(self.trials) or now < self.orphan_until

    def stop(self, seen: int, now: float) -> None:
        """Its last trial was stopped by the scheduler, at the report of step `seen`."""
        self.let_go, self.seen, self.orphan_until = True, seen, 0.0
        self.asked = max(self.asked, seen - 1)
        if self.phase is Phase.PARKED and self.told < seen:
            self.phase = Phase.LEASED
        elif self.phase is Phase.SPILLED:
            self.wait(now)

    @property
    def needs_seat(self) -> bool:
        return self.phase is Phase.WAITING and (bool(self.trials) or self.let_go)

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

    # -- seats ------------------------------------------------------------------------------------------

    def lease(self, seat: str, attempt: int) -> None:
        assert self.phase is Phase.WAITING, (
            f"{self.fingerprint[:12]} is {self.phase}, only a waiting lane is leased"
        )
        self.phase, self.seat, self.attempt, self.told = Phase.LEASED, seat, attempt, 0

    def held_by(self, seat: str, attempt: int) -> bool:
        return self.phase in (Phase.LEASED, Phase.PARKED) and (self.seat, self.attempt) == (seat, attempt)

    def report(self, seat: str, report: Report) -> bool:
        """The last report of who holds it, perhaps said before. One that is not newer than what is kept (a
        new attempt repeats some) is not kept. Returns whether it is."""
        if not self.held_by(seat, report.attempt):
            return False
        self.told = report.step
        newer = not self.reports or report.step > self.reports[-1].step
        if newer:
            self.reports.append(report)
            self.clear()
        if self.gated and self.asked < report.step:
            self.phase = Phase.PARKED
        return newer

    def answer(self, seat: str, attempt: int, now: float) -> Answer:
        """What the seat should do with the lane at this moment. One that is to be stopped first tells again
        all that the scheduler has seen: its record says so."""
        if not self.held_by(seat, attempt):
            return Answer.DROP
        if not self.wanted(now):
            if self.let_go:
                return Answer.STOP if self.told >= self.seen else Answer.GO
            return Answer.DROP
        return Answer.PARK if self.phase is Phase.PARKED else Answer.GO

    def left(self, saved: int) -> bool:
        """Its seat has died, and its newest checkpoint is of step `saved`. Returns whether it has got further
        since the last time: then it may crash as often as before."""
        further = saved > self.saved
        if further:
            self.saved, self.crashes = saved, 0
        return further

    def suspect(self, case: int, lanes: int, counts: bool = True) -> None:
        """Its seat crashed while it held so many lanes, this one among them. `counts`: for a lone one it is a
        proof."""
        self.case, self.company = case, max(1, lanes // 2)
        self.crashes += counts and lanes == 1

    @property
    def guilty(self) -> bool:
        return self.crashes > 0 and self.crashes + self.failures >= FAILURES_ALLOWED

    def clear(self) -> None:
        self.company, self.crashes = None, 0

    def give_up(self, state: State) -> None:
        """It is not tried again: it has failed, or somebody's record says how it ended before."""
        self._end(state)

    def done(self, seat: str, attempt: int, state: State, now: float) -> None:
        """The seat says how it ended. A final record counts whoever wrote it; the rest needs the lease."""
        if self.phase is Phase.ENDED:
            return
        if state in ("finished", "diverged"):
            self._end(state)
        elif self.held_by(seat, attempt):
            self.company = None
            if state == "failed":
                self.failures += 1
                if self.failures >= FAILURES_ALLOWED:
                    self._end("failed")
                    return
            elif not self.wanted(now):
                self._end("stopped")
                return
            self.wait(now)

    def wait(self, now: float) -> None:
        """Off its seat, which died or needs the place, or its end was not the end. Back to the queue, unless
        its trial has yet to ask on."""
        if self.phase is not Phase.ENDED:
            held_back = self._held_back and not self.let_go
            self.phase = Phase.SPILLED if held_back else Phase.WAITING
            self.seat, self.since = "", now

    def _end(self, state: State) -> None:
        self.phase, self.seat, self.state, self.company = Phase.ENDED, "", state, None
