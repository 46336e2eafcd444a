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

from orchestrator.finetune.engine import checkpoint
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.engine import Workshop
from orchestrator.finetune.engine.lane import Lane, Taken, share
from orchestrator.finetune.engine.lane_source import Answer, Lease, Report, Source
from orchestrator.finetune.engine.lane_state import Phase
from orchestrator.finetune.engine.polling import Pace
from orchestrator.finetune.engine.recorder import Books, Keeper
from orchestrator.finetune.engine.slots import Places
from orchestrator.finetune.failures import Fault, SeatBroken, StoreFull, fault_of, free_memory
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import ALONE, Failed, Team, caught
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Provenance, State
from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

T = TypeVar("T")

BROKEN_AFTER = 3
NEVER = -float("inf")
NEEDS_LESS = "try --gradient-checkpointing, --accumulation, a smaller --batch-size or a larger GPU"


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
    record_seconds: float = 60.0,
    team: Team = ALONE,
    workshop: Callable[[Callable[[ModelChoice, Task], Bench], Path, Path, Team], Workshop] = Workshop,
) -> None:
    """Trains what `source` leases, at most `lanes` at once, until it says closed or has given nothing for
    `idle_seconds`. The source is asked at most every `poll_seconds`, less often where it is slow (`pace.py`).
    A lane is saved at its evaluations and every `checkpoint_seconds`; one that was parked for `spill_seconds`
    makes way for a lane that waits.

    All workers of a team call this alike; `source` is rank 0's and None elsewhere. `workshop` makes what
    computes the lanes' steps and scores.

    `provenance(device, pack_lanes=, workers=, attempt=, resumed_from=, started=, ended=)` makes a record's
    provenance. A lane that fails ends alone, with a `failed` record; where memory is short there are fewer at
    once. What the source or the store raises ends the loop and leaves the lanes to their checkpoints.

    Raises SeatBroken when this process can do no more, and StoreFull when a record has found no space for
    `record_seconds`; the lanes are given back then.
    """
    made = workshop(load_bench, store.evidence, store.data, team)
    loop = _Loop(
        rank_0_source=source,
        store=store,
        books=Books(
            store,
            made,
            provenance,
            team.size,
            record_seconds,
            say=source.say if source is not None else log.warning,
        ),
        workshop=made,
        team=team,
        places=Places(lanes, spill_seconds),
        pace=Pace(poll_seconds),
        save_adapter=save_adapter,
        checkpoint_seconds=checkpoint_seconds,
    )
    lost = False
    try:
        while True:
            loop.refill()
            if loop.lanes:
                loop.turn()
            elif loop.closed or loop.idle_for(idle_seconds):
                return
            else:
                time.sleep(poll_seconds)
    except StoreFull:
        for lane in loop.lanes.values():  # rank 0; the end of this process is not their fault
            loop.source.spill(lane.name, lane.lease.attempt)
        raise
    except Exception as error:
        lost = fault_of(error) is Fault.DEVICE
        if lost:
            raise SeatBroken(f"the device is lost to this process: {error}") from error
        raise
    finally:
        if not lost:
            made.close()


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
    books: Books
    workshop: Workshop
    team: Team
    places: Places
    pace: Pace
    save_adapter: bool
    checkpoint_seconds: float
    lanes: dict[str, Lane] = field(default_factory=dict)
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
        while again and (self._room() > 0 or self.places.parked_at):
            given = self.team.agree(self._lease)
            self.closed = given.closed
            for name in given.gone:
                self._leave(self.lanes[name])
            for lease in given.leases:
                if self._room() > 0:
                    self._take(lease)
                else:  # another of them found no memory
                    self.team.agree(partial(self._decline, lease))
            again = given.again and bool(self.lanes)

    def _room(self) -> int:
        return self.places.free(self.lanes.values(), self.workshop.most_lanes)

    def _lease(self) -> _Given:
        """Rank 0. Lanes that were parked for long count as room; when nothing else is left in the pack, lanes
        of another shape may have it."""
        now = time.monotonic()
        late = self.places.late(now)
        shape = next((lane.configuration.shape for lane in self.lanes.values()), None)
        # The first lane decides the shape, and the shape how many have room.
        room = self._room() + len(late) if self.lanes else 1
        if room <= 0 or not self.pace.due(self.leased_at, now):
            return _Given(closed=self.closed)
        any_shape = not self.lanes
        offer = self.source.lease(shape, room, self.taken)
        self.leased_at = time.monotonic()
        self.pace.answered(now, self.leased_at)
        if self.lanes and not offer.leases and len(late) == len(self.lanes):
            any_shape = True
            offer = self.source.lease(None, 1, self.taken)
        new = []
        for lease in offer.leases:
            fingerprint = lease.configuration.fingerprint
            if (known := self.books.known(fingerprint)) is not None:
                self.source.done(fingerprint, lease.attempt, known)
                self.leased_at = NEVER
            else:
                new.append(lease)
        # Given up for dead and leased again, to us: the newer lease counts.
        gone = [f for f in (lease.configuration.fingerprint for lease in offer.leases) if f in self.lanes]
        late = [name for name in late if name not in gone]
        if all(lease.configuration.shape == shape for lease in new) and not offer.apart:
            late = late[: max(0, len(new) - len(gone) - self._room())]
        for name in late:
            self._give_back(self.lanes[name])
        if any_shape and new:
            self.leased_at = NEVER
        return _Given(tuple(new), (*gone, *late), offer.closed, again=any_shape and bool(new))

    def _take(self, lease: Lease) -> None:
        lane = self.lanes[lease.configuration.fingerprint] = Lane(lease)
        folder = self.store.checkpoints / lane.name
        found: list[Checkpoint] = []

        def look() -> tuple[int, int] | None:
            """Rank 0."""
            if (newest := checkpoint.newest(folder, self.books.warn, lane.name)) is None:
                return None
            found.append(newest)
            return newest.attempt, newest.step

        where = self.team.agree(look)
        place = checkpoint.place(folder, *where) if where is not None else None
        opened = self._attempt([lane], partial(self._open, saved=next(iter(found), None), place=place))
        shape = lane.configuration.shape
        if opened and shape not in self.places.most:
            most = partial(self.books.most_lanes, shape, self.places.count)
            self.places.most[shape] = self.team.agree(most)

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
            self.books.opened(lane)
        return [None]

    def _exchange(self) -> None:
        for fingerprint, answer in self.team.agree(self._changed).items():
            if fingerprint in self.lanes:
                self._obey(self.lanes[fingerprint], answer)

    def _changed(self) -> Mapping[str, Answer]:
        """Rank 0."""
        for lane in self._in(Phase.TRAINING):
            if time.monotonic() - lane.saved_at > self.checkpoint_seconds:
                self.books.save(lane)
        now = time.monotonic()
        if not self.pace.due(self.exchanged_at, now):
            return {}
        changed = self.source.exchange(self.taken)
        self.exchanged_at = time.monotonic()
        self.pace.answered(now, self.exchanged_at)
        return changed

    def _obey(self, lane: Lane, answer: Answer) -> None:
        if answer is Answer.DROP:
            self.team.agree(partial(self.books.known, lane.name))
            self._leave(lane)
        elif answer is Answer.LEAVE:
            self.team.agree(partial(self._give_back, lane))
            self._leave(lane)
        elif answer is Answer.STOP:
            further = f", trained to step {lane.step}" if lane.step > lane.told else ""
            self._end(lane, "stopped", f"stopped by the scheduler after step {lane.told}{further}")
        elif answer is Answer.PARK and lane.phase is not Phase.PARKED:
            lane.move(Phase.PARKED)
            self.places.park(lane)
        elif answer is Answer.GO and lane.phase in (Phase.PARKED, Phase.REPORTING):
            lane.go_on()
            self.places.unpark(lane.name)

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
            time.sleep(self.pace.seconds)

    def idle_for(self, seconds: float) -> bool:
        return self.team.agree(lambda: time.monotonic() - self.busy_at > seconds)

    def _in(self, phase: Phase) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.phase is phase]

    def _attempt(
        self, lanes: Sequence[Lane], work: Callable[[Sequence[Lane]], Sequence[T]]
    ) -> list[tuple[Lane, T]]:
        """`work` gives one result a lane. If it raises for several, it is done again for each alone, and only
        those for which it raises again fail. Where memory is short, it is done again for fewer."""
        if not lanes:
            return []
        try:
            done = self.team.attempt(lambda: list(zip(lanes, work(lanes), strict=True)))
        except Failed as error:
            failed = error.bare()
        else:
            self.books.full_since = None
            return done
        # Out of the handler: the error's traceback held what the work had made.
        if failed.fault is Fault.DEVICE:
            raise failed
        if failed.fault is Fault.DISK:
            self.team.agree(partial(self.books.wait_for_space, failed))
            return self._attempt(lanes, work)
        if failed.fault is Fault.MEMORY and len(self.lanes) > 1:
            self._shrink()
            return self._attempt([lane for lane in lanes if lane.name in self.lanes], work)
        if len(lanes) == 1:
            self._fail(lanes[0], failed)
            return []
        log.warning("%d lanes together: %s; now one by one", len(lanes), failed.reason)
        done = [one for lane in lanes if lane.name in self.lanes for one in self._attempt([lane], work)]
        return [(lane, one) for lane, one in done if lane.name in self.lanes]

    def _shrink(self, torn: Sequence[Lane] = ()) -> None:
        """There is too little memory: half of the lanes are saved and given back, and no more than the others
        train here at once from now on. `torn` ones leave in any case, without being saved: they are half way
        through a step, and go on from their newest checkpoint."""
        free_memory()
        tried, shape = len(self.lanes), next(iter(self.lanes.values())).configuration.shape
        most, leaving = self.places.halve(self.lanes.values(), torn)

        def tell() -> None:
            """Rank 0."""
            for lane in torn:
                self.source.spill(lane.name, lane.lease.attempt)
            for lane in leaving:
                self._give_back(lane)
            self.books.remember(shape, most, tried)

        self.team.agree(tell)
        for lane in (*torn, *leaving):
            self._leave(lane)
        free_memory()

    def _train(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        together = len(self.lanes)
        taken = self._attempt(lanes, self._gradients)
        outcomes = self.team.gather([caught(partial(lane.take_step, step)) for lane, step in taken])
        diverged, torn = [], []
        for (lane, _), told in zip(taken, zip(*outcomes, strict=True), strict=True):
            lane.pack_lanes = max(lane.pack_lanes, together)
            if failed := next((one for one in told if isinstance(one, Failed)), None):
                if failed.fault is Fault.DEVICE:
                    raise failed
                if failed.fault is Fault.MEMORY and together > 1:
                    torn.append(lane)
                else:
                    self._fail(lane, failed)
            elif told[0] is not None:
                diverged.append((lane, told[0]))
            else:
                self.taken += 1
        if taken:
            self.last_failure = ""
        share(started, lanes, "train_seconds")
        for lane, reason in diverged:
            self._end(lane, "diverged", reason)
        if torn:
            self._shrink(torn)

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
        share(started, lanes, "evaluate_seconds")
        for lane in self._in(Phase.EVALUATING):
            if lane.name not in self.lanes:  # it made way for another's adapter
                continue
            if reason := lane.unsound():
                self._end(lane, "diverged", reason)
                continue
            lane.owe(after=lane.step - 1)
            lane.move(Phase.REPORTING)
            if not lane.at_end:
                self.team.agree(partial(self.books.save, lane))
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
        state = self.books.record(lane, state, reason, trace)
        last = [self.source.report(report) for report in lane.to_report] if state == "finished" else []
        if Answer.DROP not in last:
            self.source.done(lane.name, lane.lease.attempt, state)

    def _fail(self, lane: Lane, failed: Failed) -> None:
        """The lane's own record says why. When one lane after another fails with the same words and none is
        left to take a step, it is not the lanes: a lost GPU, a base that is gone. Then this seat ends, before
        it has spoilt them all."""
        reason = failed.reason
        if failed.fault is Fault.MEMORY:
            reason = f"out of memory with one lane alone: {NEEDS_LESS} ({reason})"
        self._end(lane, "failed", reason, failed.trace)
        if failed.fault is Fault.MEMORY:
            free_memory()
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
        self.places.unpark(lane.name)
        self.books.left(lane)
        self.workshop.remove(lane.name)
        self.leased_at = NEVER  # there is room: ask at once

    def _decline(self, lease: Lease) -> None:
        """Rank 0."""
        self.source.spill(lease.configuration.fingerprint, lease.attempt)

    def _give_back(self, lane: Lane) -> None:
        """Rank 0. Whoever leases it next goes on from here; where it cannot be saved, from its newest
        checkpoint, at most an interval back."""
        self.books.save(lane)
        self.source.spill(lane.name, lane.lease.attempt)

    def _keep_adapter(self, lanes: Sequence[Lane]) -> Sequence[None]:
        if self.save_adapter and self.team.rank == 0:
            for lane in lanes:
                folder = self.store.adapters / lane.name
                self.workshop.save_adapter(lane.name, folder, lane.configuration.model.name)
        return [None] * len(lanes)
