"""The fine-tuning loop: lanes in, reports and records out.

Each round: lease what there is room for, hear what has changed, one optimizer step for every lane that may
train, then scores for those that are due. Lanes join and leave at any round; none knows of another.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from orchestrator.finetune import checkpoint
from orchestrator.finetune.lane import Lane, Taken
from orchestrator.finetune.models import Bench
from orchestrator.finetune.outcome import FINAL, Keeper, record_of
from orchestrator.finetune.phase import Phase
from orchestrator.finetune.source import Answer, Lease, Source
from orchestrator.finetune.workshop import Workshop
from orchestrator.record.schema import Provenance, State
from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

T = TypeVar("T")

BROKEN_AFTER = 3


class SeatBroken(RuntimeError):
    """Whatever this process is given fails."""


def run(
    source: Source,
    store: Keeper,
    load_bench: Callable[[ModelChoice], Bench],
    *,
    lanes: int,
    idle_seconds: float,
    provenance: Callable[..., Provenance],
    poll_seconds: float = 0.1,
    save_adapter: bool = False,
    checkpoint_seconds: float = 120.0,
) -> None:
    """Trains what `source` leases, at most `lanes` at once, until it says closed or has given nothing for
    `idle_seconds`. The source is asked at most every `poll_seconds`; a lane is saved at its evaluations and
    every `checkpoint_seconds`.

    `provenance(device, pack_lanes=, attempt=, resumed_from=, started=, ended=)` makes a record's provenance.
    A lane that fails ends alone, with a `failed` record. What the source or the store raises ends the loop
    and leaves the lanes to their checkpoints.
    """
    loop = _Loop(
        source, store, Workshop(load_bench), lanes, poll_seconds, provenance, save_adapter, checkpoint_seconds
    )
    idle_since = time.monotonic()
    try:
        while True:
            loop.refill()
            if loop.lanes:
                loop.turn()
                idle_since = time.monotonic()
            elif loop.closed or time.monotonic() - idle_since > idle_seconds:
                return
            else:
                time.sleep(poll_seconds)
    finally:
        loop.workshop.close()


class _Loop:
    def __init__(
        self,
        source: Source,
        store: Keeper,
        workshop: Workshop,
        room: int,
        poll_seconds: float,
        provenance: Callable[..., Provenance],
        save_adapter: bool,
        checkpoint_seconds: float,
    ) -> None:
        self.source, self.store, self.workshop = source, store, workshop
        self.room, self.poll_seconds, self.checkpoint_seconds = room, poll_seconds, checkpoint_seconds
        self.provenance, self.save_adapter = provenance, save_adapter
        self.lanes: dict[str, Lane] = {}
        self.closed = False
        self.last_failure = ""
        self.failed_alike: set[str] = set()
        self.leased_at = self.exchanged_at = -float("inf")

    # -- the source -------------------------------------------------------------------------------------

    def refill(self) -> None:
        """Leases when there is room: at once after a lane has left, else at most every `poll_seconds`."""
        if time.monotonic() - self.leased_at < self.poll_seconds:
            return
        while True:
            # The first lane decides the shape, and the shape how many have room.
            shape, room = None, 1
            if self.lanes:
                shape = next(iter(self.lanes.values())).configuration.shape
                room = min(self.room, self.workshop.most_lanes) - len(self.lanes)
            if room <= 0:
                return
            offer = self.source.lease(shape, room)
            self.leased_at, self.closed = time.monotonic(), offer.closed
            for lease in offer.leases:
                self._take(lease)
            if shape is not None or not self.lanes:
                return

    def _take(self, lease: Lease) -> None:
        fingerprint = lease.configuration.fingerprint
        if fingerprint in self.lanes:  # given up for dead and leased again, to us: the newer lease counts
            self._leave(self.lanes[fingerprint])
        known = self.store.get(fingerprint)
        if known is not None and known.state in FINAL:
            self.source.done(fingerprint, lease.attempt, known.state)
            self.leased_at = -float("inf")
            return
        lane = self.lanes[fingerprint] = Lane(lease)
        self._attempt([lane], self._open)

    def _open(self, lanes: Sequence[Lane]) -> Sequence[None]:
        (lane,) = lanes
        shapes = {other.configuration.shape for other in self.lanes.values()}
        if len(shapes) > 1:
            raise RuntimeError(f"leased a lane of shape {lane.configuration.shape} into a pack of another")
        pack = self.workshop.pack(lane.configuration)
        saved = checkpoint.newest(self.store.checkpoints / lane.name)
        lane.open(pack.adapters, self.workshop.variant, pack.data.untrained["validation"]["loss"], saved)
        return [None]

    def _exchange(self) -> None:
        if time.monotonic() - self.exchanged_at < self.poll_seconds:
            return
        changed = self.source.exchange({name: lane.step for name, lane in self.lanes.items()})
        self.exchanged_at = time.monotonic()
        for fingerprint, answer in changed.items():
            if fingerprint in self.lanes:
                self._obey(self.lanes[fingerprint], answer)

    def _obey(self, lane: Lane, answer: Answer) -> None:
        if answer is Answer.DROP:
            self._leave(lane)
        elif answer is Answer.STOP:
            self._save(lane)
            self._end(lane, "stopped", f"stopped by the scheduler after step {lane.step}")
        elif answer is Answer.PARK and lane.phase is not Phase.PARKED:
            lane.move(Phase.PARKED)
        elif answer is Answer.GO and lane.phase in (Phase.PARKED, Phase.REPORTING):
            lane.go_on()

    # -- a round ----------------------------------------------------------------------------------------

    def turn(self) -> None:
        for lane in self._in(Phase.REPORTING):  # resumed ones owe reports
            self._report(lane)
        self._exchange()
        busy = bool(self._in(Phase.TRAINING) or self._in(Phase.EVALUATING))
        self._train(self._in(Phase.TRAINING))
        self._evaluate(self._in(Phase.EVALUATING))
        if self.lanes and not busy:
            time.sleep(self.poll_seconds)

    def _in(self, phase: Phase) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.phase is phase]

    def _attempt(
        self, lanes: Sequence[Lane], work: Callable[[Sequence[Lane]], Sequence[T]]
    ) -> list[tuple[Lane, T]]:
        """`work` gives one result a lane. If it raises for several, it is done again for each alone, and only
        those for which it raises again fail."""
        try:
            return list(zip(lanes, work(lanes), strict=True)) if lanes else []
        except Exception as error:
            if len(lanes) == 1:
                self._fail(lanes[0], error)
                return []
            log.warning("%d lanes together: %s: %s; now one by one", len(lanes), type(error).__name__, error)
        return [found for lane in lanes for found in self._attempt([lane], work)]

    def _train(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        together = len(self.lanes)
        taken = self._attempt(lanes, self.workshop.current.gradients)
        diverged = []
        for lane, step in taken:
            lane.pack_lanes = max(lane.pack_lanes, together)
            for _, reason in self._attempt([lane], partial(_take_step, step)):
                diverged += [(lane, reason)] if reason else []
        if taken:
            self.last_failure = ""
        _share(started, lanes, "train_seconds")
        for lane, reason in diverged:
            self._end(lane, "diverged", reason)
        for lane in self._in(Phase.TRAINING):
            if time.monotonic() - lane.saved_at > self.checkpoint_seconds:
                self._save(lane)

    def _evaluate(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        scores = self.workshop.current.scores
        for lane, scored in self._attempt(lanes, partial(scores, split="validation")):
            lane.scored("validation", scored)
        ending = [lane for lane in self._in(Phase.EVALUATING) if lane.at_end]
        for lane, scored in self._attempt(ending, partial(scores, split="test")):
            lane.scored("test", scored)
        _share(started, lanes, "evaluate_seconds")
        for lane in self._in(Phase.EVALUATING):
            if reason := lane.unsound():
                self._end(lane, "diverged", reason)
                continue
            lane.owe(after=lane.step - 1)
            lane.move(Phase.REPORTING)
            if not lane.at_end:
                self._save(lane)
                self._report(lane)
            elif self._attempt([lane], self._keep_adapter):
                self._end(lane, "finished")

    def _report(self, lane: Lane) -> None:
        while lane.phase is Phase.REPORTING:
            self._obey(lane, self.source.report(lane.to_report.popleft()))

    # -- ends -------------------------------------------------------------------------------------------

    def _end(self, lane: Lane, state: State, reason: str = "", trace: str = "") -> None:
        """The record first, then word to the source; a finished lane still owes its last report."""
        if not self.store.put(record_of(lane, state, self.workshop, self.provenance, reason, trace)):
            first = self.store.get(lane.name)  # somebody else's final record was there first
            state = first.state if first is not None else state
        attempt = lane.lease.attempt
        last = [self.source.report(report) for report in lane.to_report] if state == "finished" else []
        self._leave(lane)
        if state in FINAL:
            checkpoint.discard(self.store.checkpoints / lane.name)
        if Answer.DROP not in last:
            self.source.done(lane.name, attempt, state)

    def _fail(self, lane: Lane, error: Exception) -> None:
        """The lane's own record says why. When one lane after another fails with the same words and none is
        left to take a step, it is not the lanes: a lost GPU, a base that is gone. Then this seat ends, before
        it has spoilt them all."""
        reason = f"{type(error).__name__}: {error}"
        self._end(lane, "failed", reason, traceback.format_exc())
        if reason != self.last_failure:
            self.last_failure, self.failed_alike = reason, set()
        self.failed_alike.add(lane.name)
        if len(self.failed_alike) >= BROKEN_AFTER and not self.lanes:
            raise SeatBroken(
                f"{len(self.failed_alike)} configurations in a row failed with {reason}"
            ) from error

    def _leave(self, lane: Lane) -> None:
        lane.move(Phase.ENDED)
        del self.lanes[lane.name]
        self.workshop.remove(lane.name)
        self.leased_at = -float("inf")  # there is room: ask at once

    def _save(self, lane: Lane) -> None:
        frozen = self.workshop.current.adapters.frozen(lane.name)
        checkpoint.write(self.store.checkpoints / lane.name, lane.checkpoint(frozen))

    def _keep_adapter(self, lanes: Sequence[Lane]) -> Sequence[None]:
        if self.save_adapter:
            for lane in lanes:
                self.workshop.save_adapter(
                    lane.name, self.store.adapters / lane.name, lane.configuration.model.name
                )
        return [None] * len(lanes)


def _take_step(taken: Taken, lanes: Sequence[Lane]) -> list[str | None]:
    return [lane.take_step(taken) for lane in lanes]


def _share(started: float, lanes: Sequence[Lane], what: str) -> None:
    """The seconds since `started`, in equal parts to the lanes that they went to."""
    seconds = (time.monotonic() - started) / len(lanes)
    for lane in lanes:
        setattr(lane, what, getattr(lane, what) + seconds)
