"""The fine-tuning loop: lanes in, reports and records out.

Each round: lease what there is room for, hear what has changed, one optimizer step for every lane that may
train, then scores for those that are due. Lanes join and leave at any round; none knows of another.

The workers of a seat (`team.py`) run it in step. What only one can know or do (the source, the clock, the
store) is done by rank 0 in the methods that say so; everything else follows, alike on all, from what it told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from orchestrator.finetune import checkpoint
from orchestrator.finetune.checkpoint import Checkpoint
from orchestrator.finetune.lane import Lane, Taken
from orchestrator.finetune.models import Bench
from orchestrator.finetune.outcome import FINAL, Keeper, record_of
from orchestrator.finetune.phase import Phase
from orchestrator.finetune.source import Answer, Lease, Report, Source
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.team import ALONE, Failed, Team
from orchestrator.finetune.workshop import Workshop
from orchestrator.record.schema import Provenance, State
from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

T = TypeVar("T")

BROKEN_AFTER = 3
NEVER = -float("inf")


class SeatBroken(RuntimeError):
    """Whatever this process is given fails."""


def run(
    source: Source | None,
    store: Keeper,
    load_bench: Callable[[ModelChoice, Task], Bench],
    *,
    lanes: int,
    idle_seconds: float,
    provenance: Callable[..., Provenance],
    poll_seconds: float = 0.1,
    spill_seconds: float = 1.0,
    save_adapter: bool = False,
    checkpoint_seconds: float = 120.0,
    team: Team = ALONE,
) -> None:
    """Trains what `source` leases, at most `lanes` at once, until it says closed or has given nothing for
    `idle_seconds`. The source is asked at most every `poll_seconds`; a lane is saved at its evaluations and
    every `checkpoint_seconds`; one that was parked for `spill_seconds` makes way for a lane that waits.

    All workers of a team call this alike; `source` is rank 0's and None elsewhere.

    `provenance(device, pack_lanes=, workers=, attempt=, resumed_from=, started=, ended=)` makes a record's
    provenance. A lane that fails ends alone, with a `failed` record. What the source or the store raises ends
    the loop and leaves the lanes to their checkpoints.
    """
    loop = _Loop(
        rank_0_source=source,
        store=store,
        workshop=Workshop(load_bench, store.evidence, team),
        team=team,
        places=lanes,
        provenance=provenance,
        poll_seconds=poll_seconds,
        spill_seconds=spill_seconds,
        save_adapter=save_adapter,
        checkpoint_seconds=checkpoint_seconds,
    )
    try:
        while True:
            loop.refill()
            if loop.lanes:
                loop.turn()
            elif loop.closed or loop.idle_for(idle_seconds):
                return
            else:
                time.sleep(poll_seconds)
    finally:
        loop.workshop.close()


@dataclass(frozen=True)
class _Given:
    """What a lease came to: lanes to open, and those (by name) that leave the pack first."""

    leases: tuple[Lease, ...] = ()
    gone: tuple[str, ...] = ()
    closed: bool = False
    again: bool = False
    """The first lane decided the shape: ask at once for more of it."""


@dataclass
class _Loop:
    rank_0_source: Source | None
    store: Keeper
    workshop: Workshop
    team: Team
    places: int
    provenance: Callable[..., Provenance]
    poll_seconds: float
    spill_seconds: float
    save_adapter: bool
    checkpoint_seconds: float
    lanes: dict[str, Lane] = field(default_factory=dict)
    parked_at: dict[str, float] = field(default_factory=dict)
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What a lane's newest checkpoint holds: steps, evaluations."""
    taken: int = 0
    """Optimizer steps since the loop began, all lanes together."""
    closed: bool = False
    last_failure: str = ""
    failed_alike: set[str] = field(default_factory=set)
    leased_at: float = NEVER
    exchanged_at: float = NEVER
    busy_at: float = field(default_factory=time.monotonic)

    # -- the source -------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        assert self.rank_0_source is not None, "only rank 0 speaks to the source"
        return self.rank_0_source

    def refill(self) -> None:
        """Leases when there is room: at once after a lane has left, else at most every `poll_seconds`."""
        again = True
        while again and (self._room() > 0 or self.parked_at):
            given = self.team.agree(self._lease)
            self.closed = given.closed
            for name in given.gone:
                self._leave(self.lanes[name])
            for lease in given.leases:
                self._take(lease)
            again = given.again and bool(self.lanes)

    def _room(self) -> int:
        return min(self.places, self.workshop.most_lanes) - len(self.lanes)

    def _lease(self) -> _Given:
        """Rank 0. Lanes that were parked for long count as room; when nothing else is left in the pack, lanes
        of another shape may have it."""
        now = time.monotonic()
        late = [name for name, since in self.parked_at.items() if now - since > self.spill_seconds]
        shape = next((lane.configuration.shape for lane in self.lanes.values()), None)
        # The first lane decides the shape, and the shape how many have room.
        room = self._room() + len(late) if self.lanes else 1
        if room <= 0 or now - self.leased_at < self.poll_seconds:
            return _Given(closed=self.closed)
        any_shape = not self.lanes
        offer = self.source.lease(shape, room, self.taken)
        if self.lanes and not offer.leases and len(late) == len(self.lanes):
            any_shape = True
            offer = self.source.lease(None, 1, self.taken)
        self.leased_at = now
        new = []
        for lease in offer.leases:
            known = self.store.get(lease.configuration.fingerprint)
            if known is not None and known.state in FINAL:
                self.source.done(known.fingerprint, lease.attempt, known.state)
                self.leased_at = NEVER
            else:
                new.append(lease)
        # Given up for dead and leased again, to us: the newer lease counts.
        gone = [f for f in (lease.configuration.fingerprint for lease in offer.leases) if f in self.lanes]
        late = [name for name in late if name not in gone]
        if all(lease.configuration.shape == shape for lease in new):
            late = late[: max(0, len(new) - len(gone) - self._room())]
        for name in late:
            self._write(self.lanes[name])
            self.source.spill(name, self.lanes[name].lease.attempt)
        if any_shape and new:
            self.leased_at = NEVER
        return _Given(tuple(new), (*gone, *late), offer.closed, again=any_shape and bool(new))

    def _take(self, lease: Lease) -> None:
        lane = self.lanes[lease.configuration.fingerprint] = Lane(lease)
        folder = self.store.checkpoints / lane.name
        found: list[Checkpoint] = []

        def look() -> tuple[int, int] | None:
            """Rank 0."""
            if (newest := checkpoint.newest(folder)) is None:
                return None
            found.append(newest)
            return newest.attempt, newest.step

        where = self.team.agree(look)
        place = checkpoint.place(folder, *where) if where is not None else None
        self._attempt([lane], partial(self._open, saved=next(iter(found), None), place=place))

    def _open(self, lanes: Sequence[Lane], saved: Checkpoint | None, place: Path | None) -> Sequence[None]:
        """Rank 0 has found the newest checkpoint and read it; the others read the same."""
        (lane,) = lanes
        shapes = {other.configuration.shape for other in self.lanes.values()}
        if len(shapes) > 1:
            raise RuntimeError(f"leased a lane of shape {lane.configuration.shape} into a pack of another")
        if saved is None and place is not None:
            saved = checkpoint.read(place)
        self.workshop.open(lane, saved)
        if saved is not None:
            self.saved[lane.name] = (lane.step, len(lane.evaluations))
        return [None]

    def _exchange(self) -> None:
        for fingerprint, answer in self.team.agree(self._changed).items():
            if fingerprint in self.lanes:
                self._obey(self.lanes[fingerprint], answer)

    def _changed(self) -> Mapping[str, Answer]:
        """Rank 0."""
        for lane in self._in(Phase.TRAINING):
            if time.monotonic() - lane.saved_at > self.checkpoint_seconds:
                self._write(lane)
        if time.monotonic() - self.exchanged_at < self.poll_seconds:
            return {}
        changed = self.source.exchange(self.taken)
        self.exchanged_at = time.monotonic()
        return changed

    def _obey(self, lane: Lane, answer: Answer) -> None:
        if answer is Answer.DROP:
            self._leave(lane)
        elif answer is Answer.STOP:
            further = f", trained to step {lane.step}" if lane.step > lane.told else ""
            self._end(lane, "stopped", f"stopped by the scheduler after step {lane.told}{further}")
        elif answer is Answer.PARK and lane.phase is not Phase.PARKED:
            lane.move(Phase.PARKED)
            self.parked_at[lane.name] = time.monotonic()
        elif answer is Answer.GO and lane.phase in (Phase.PARKED, Phase.REPORTING):
            lane.go_on()
            self.parked_at.pop(lane.name, None)

    # -- a round ----------------------------------------------------------------------------------------

    def turn(self) -> None:
        self.busy_at = time.monotonic()
        for lane in self._in(Phase.REPORTING):  # resumed ones owe reports
            self._report(lane)
        self._exchange()
        busy = bool(self._in(Phase.TRAINING) or self._in(Phase.EVALUATING))
        self._train(self._in(Phase.TRAINING))
        self._evaluate(self._in(Phase.EVALUATING))
        if self.lanes and not busy:
            time.sleep(self.poll_seconds)

    def idle_for(self, seconds: float) -> bool:
        return self.team.agree(lambda: time.monotonic() - self.busy_at > seconds)

    def _in(self, phase: Phase) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.phase is phase]

    def _attempt(
        self, lanes: Sequence[Lane], work: Callable[[Sequence[Lane]], Sequence[T]]
    ) -> list[tuple[Lane, T]]:
        """`work` gives one result a lane. If it raises for several, it is done again for each alone, and only
        those for which it raises again fail."""
        if not lanes:
            return []
        try:
            return self.team.attempt(lambda: list(zip(lanes, work(lanes), strict=True)))
        except Failed as failed:
            if len(lanes) == 1:
                self._fail(lanes[0], failed)
                return []
            log.warning("%d lanes together: %s; now one by one", len(lanes), failed)
        return [found for lane in lanes for found in self._attempt([lane], work)]

    def _train(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        together = len(self.lanes)
        taken = self._attempt(lanes, self._gradients)
        outcomes = self.team.gather([_take_step(lane, step) for lane, step in taken])
        diverged = []
        for (lane, _), told in zip(taken, zip(*outcomes, strict=True), strict=True):
            lane.pack_lanes = max(lane.pack_lanes, together)
            if failed := next((one for one in told if isinstance(one, Failed)), None):
                self._fail(lane, failed)
            elif told[0] is not None:
                diverged.append((lane, told[0]))
            else:
                self.taken += 1
        if taken:
            self.last_failure = ""
        _share(started, lanes, "train_seconds")
        for lane, reason in diverged:
            self._end(lane, "diverged", reason)

    def _gradients(self, lanes: Sequence[Lane]) -> Sequence[Taken]:
        pack = self.workshop.current
        pending = self.team.attempt(lambda: pack.backward(lanes))
        return self.team.gather(pack.reduce(pending))[0]

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
                self.team.agree(partial(self._write, lane))
                self._report(lane)
            elif self._attempt([lane], self._keep_adapter):
                self._end(lane, "finished")

    def _report(self, lane: Lane) -> None:
        while lane.phase is Phase.REPORTING:
            report = lane.to_report.popleft()
            self._obey(lane, self.team.agree(partial(self._tell, report)))

    def _tell(self, report: Report) -> Answer:
        """Rank 0."""
        return self.source.report(report)

    # -- ends -------------------------------------------------------------------------------------------

    def _end(self, lane: Lane, state: State, reason: str = "", trace: str = "") -> None:
        self.team.agree(partial(self._conclude, lane, state, reason, trace))
        self._leave(lane)

    def _conclude(self, lane: Lane, state: State, reason: str, trace: str) -> None:
        """Rank 0. The record first, then word to the source; a finished lane still owes its last report."""
        if state == "stopped":
            self._write(lane)
        record = record_of(lane, state, self.workshop, self.provenance, self.team.size, reason, trace)
        if not self.store.put(record):
            first = self.store.get(lane.name)  # somebody else's final record was there first
            state = first.state if first is not None else state
        last = [self.source.report(report) for report in lane.to_report] if state == "finished" else []
        if state in FINAL:
            checkpoint.discard(self.store.checkpoints / lane.name)
        if Answer.DROP not in last:
            self.source.done(lane.name, lane.lease.attempt, state)

    def _fail(self, lane: Lane, failed: Failed) -> None:
        """The lane's own record says why. When one lane after another fails with the same words and none is
        left to take a step, it is not the lanes: a lost GPU, a base that is gone. Then this seat ends, before
        it has spoilt them all."""
        self._end(lane, "failed", failed.reason, failed.trace)
        if not self.lanes:
            self.workshop.close()  # it may be open on some of the workers only
        if failed.reason != self.last_failure:
            self.last_failure, self.failed_alike = failed.reason, set()
        self.failed_alike.add(lane.name)
        if len(self.failed_alike) >= BROKEN_AFTER and not self.lanes:
            raise SeatBroken(
                f"{len(self.failed_alike)} configurations in a row failed with {failed.reason}"
            ) from failed

    def _leave(self, lane: Lane) -> None:
        lane.move(Phase.ENDED)
        del self.lanes[lane.name]
        self.parked_at.pop(lane.name, None)
        self.saved.pop(lane.name, None)
        self.workshop.remove(lane.name)
        self.leased_at = NEVER  # there is room: ask at once

    def _write(self, lane: Lane) -> None:
        """Rank 0. Saves the lane, unless its newest checkpoint says the same."""
        what = (lane.step, len(lane.evaluations))
        if self.saved.get(lane.name) != what:
            frozen = self.workshop.current.adapters.frozen(lane.name)
            checkpoint.write(self.store.checkpoints / lane.name, lane.checkpoint(frozen))
            self.saved[lane.name] = what

    def _keep_adapter(self, lanes: Sequence[Lane]) -> Sequence[None]:
        if self.save_adapter and self.team.rank == 0:
            for lane in lanes:
                folder = self.store.adapters / lane.name
                self.workshop.save_adapter(lane.name, folder, lane.configuration.model.name)
        return [None] * len(lanes)


def _take_step(lane: Lane, taken: Taken) -> str | Failed | None:
    """Why the lane has diverged, if it has; what it raises, as a value."""
    try:
        return lane.take_step(taken)
    except Exception as error:
        return Failed.of(error)


def _share(started: float, lanes: Sequence[Lane], what: str) -> None:
    """The seconds since `started`, in equal parts to the lanes that they went to."""
    seconds = (time.monotonic() - started) / len(lanes)
    for lane in lanes:
        setattr(lane, what, getattr(lane, what) + seconds)
