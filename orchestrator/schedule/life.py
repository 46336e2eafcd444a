"""The life of one lane between its trials and its seat: a plain state machine.

    waiting --lease--> leased --report--> parked --a trial asks on--> leased --done--> ended
       ^                 |                  |
       +---- the seat died, failed, or stopped a lane that is wanted again ----+

Trials come and go by name; a lane that nobody wants is stopped where it trains and forgotten where it waits.
All answers are computed from the state, so that asking twice (a lost reply, a restarted caller) does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.finetune.source import Answer, Report
from orchestrator.record.schema import FAILURES_ALLOWED, State

ORPHAN_SECONDS = 60.0  # how long a lane announced by a seat waits for its trial after the broker restarted


class Phase(StrEnum):
    WAITING = "waiting"
    LEASED = "leased"
    PARKED = "parked"
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
    orphan_until: float = 0.0

    # -- trials -----------------------------------------------------------------------------------------

    def ask(self, after: int) -> Report | State | None:
        """The first report beyond step `after`, else how the lane ended, else None (not yet)."""
        for report in self.reports:
            if report.step > after:
                return report
        if self.phase is Phase.ENDED:
            return self.state
        self.asked = max(self.asked, after)
        if self.phase is Phase.PARKED and self.asked >= self.reports[-1].step:
            self.phase = Phase.LEASED
        return None

    def wanted(self, now: float) -> bool:
        return bool(self.trials) or now < self.orphan_until

    # -- seats ------------------------------------------------------------------------------------------

    def lease(self, seat: str, attempt: int) -> None:
        assert self.phase is Phase.WAITING, (
            f"{self.fingerprint[:12]} is {self.phase}, only a waiting lane is leased"
        )
        self.phase, self.seat, self.attempt = Phase.LEASED, seat, attempt

    def held_by(self, seat: str, attempt: int) -> bool:
        return self.phase in (Phase.LEASED, Phase.PARKED) and (self.seat, self.attempt) == (seat, attempt)

    def report(self, seat: str, report: Report, now: float) -> Answer:
        """A report that is not newer than the last one (a new attempt repeats some) is answered, not kept."""
        if not self.held_by(seat, report.attempt):
            return Answer.DROP
        if not self.reports or report.step > self.reports[-1].step:
            self.reports.append(report)
        if self.gated and self.asked < report.step:
            self.phase = Phase.PARKED
        return self.answer(seat, report.attempt, now)

    def answer(self, seat: str, attempt: int, now: float) -> Answer:
        """What the seat should do with the lane at this moment."""
        if not self.held_by(seat, attempt):
            return Answer.DROP
        if not self.wanted(now):
            return Answer.STOP
        return Answer.PARK if self.phase is Phase.PARKED else Answer.GO

    def done(self, seat: str, attempt: int, state: State, now: float) -> None:
        """The seat says how it ended. A final record counts whoever wrote it; the rest needs the lease."""
        if self.phase is Phase.ENDED:
            return
        if state in ("finished", "diverged"):
            self._end(state)
        elif self.held_by(seat, attempt):
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
        """Back to the queue: its seat died, or its end was not the end."""
        if self.phase is not Phase.ENDED:
            self.phase, self.seat, self.since = Phase.WAITING, "", now

    def _end(self, state: State) -> None:
        self.phase, self.seat, self.state = Phase.ENDED, "", state
