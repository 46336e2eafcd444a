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
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import BackwardResult, Lane, share_elapsed_seconds
from orchestrator.finetune.engine.lane_source import Directive, LaneSource, Lease, Report
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.engine.polling import PollInterval
from orchestrator.finetune.engine.recorder import LaneRecorder, LaneStore
from orchestrator.finetune.engine.slots import LaneSlots
from orchestrator.finetune.failures import (
    BrokenKind,
    Fault,
    StoreFullError,
    TrainerBrokenError,
    classify_error,
    free_memory,
)
from orchestrator.finetune.models.loading import BaseModel
from orchestrator.finetune.process_group import (
    SINGLE_PROCESS_GROUP,
    ProcessGroup,
    WorkerError,
    result_or_error,
)
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Provenance, RecordState
from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_IDENTICAL_FAILURES = 3
NEVER = -float("inf")
OUT_OF_MEMORY_ADVICE = "try --gradient-checkpointing, --accumulation, a smaller --batch-size or a larger GPU"


def run(
    source: LaneSource | None,
    store: LaneStore,
    load_base_model: Callable[[ModelChoice, Task], BaseModel],
    *,
    max_lanes: int,
    idle_seconds: float,
    provenance: Callable[..., Provenance],
    poll_seconds: float = 0.1,
    spill_seconds: float = 1.0,
    save_adapter: bool = False,
    checkpoint_seconds: float = 120.0,
    store_full_timeout_seconds: float = 60.0,
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    make_engine: Callable[
        [Callable[[ModelChoice, Task], BaseModel], Path, Path, ProcessGroup], Engine
    ] = Engine,
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
    engine = make_engine(load_base_model, store.calibration, store.data, process_group)
    loop = _Loop(
        rank_0_source=source,
        store=store,
        recorder=LaneRecorder(
            store,
            engine,
            provenance,
            process_group.world_size,
            store_full_timeout_seconds,
            notify=source.notify if source is not None else log.warning,
        ),
        engine=engine,
        process_group=process_group,
        slots=LaneSlots(max_lanes, spill_seconds),
        poll_interval=PollInterval(poll_seconds),
        save_adapter=save_adapter,
        checkpoint_seconds=checkpoint_seconds,
    )
    is_device_lost = False
    try:
        while True:
            loop.lease_lanes()
            if loop.lanes:
                loop.run_round()
            elif loop.closed or loop.is_idle_for(idle_seconds):
                return
            else:
                time.sleep(poll_seconds)
    except StoreFullError:
        for lane in loop.lanes.values():  # rank 0; the end of this process is not their fault
            loop.source.return_lease(lane.fingerprint, lane.lease.attempt)
        raise
    except Exception as error:
        is_device_lost = classify_error(error) is Fault.DEVICE
        if is_device_lost:
            raise TrainerBrokenError(
                f"the device is lost to this process: {error}", BrokenKind.DEVICE_LOST
            ) from error
        raise
    finally:
        if not is_device_lost:
            engine.detach_adapters()


@dataclass(frozen=True)
class _LeaseOutcome:
    """What a lease came to: lanes to open, and those (by name) that leave the pack first."""

    leases: tuple[Lease, ...] = ()
    leaving: tuple[str, ...] = ()
    closed: bool = False
    lease_again: bool = False
    """The first lane decided the shape: ask at once for more of it."""


@dataclass
class _Loop:
    rank_0_source: LaneSource | None
    store: LaneStore
    recorder: LaneRecorder
    engine: Engine
    process_group: ProcessGroup
    slots: LaneSlots
    poll_interval: PollInterval
    save_adapter: bool
    checkpoint_seconds: float
    lanes: dict[str, Lane] = field(default_factory=dict)
    steps_taken: int = 0
    """Optimizer steps since the loop began, all lanes together."""
    closed: bool = False
    last_failure: str = ""
    lanes_failed_alike: set[str] = field(default_factory=set)
    leased_at: float = NEVER
    exchanged_at: float = NEVER
    busy_at: float = field(default_factory=time.monotonic)

    # -- the source -------------------------------------------------------------------------------------

    @property
    def source(self) -> LaneSource:
        assert self.rank_0_source is not None, "only rank 0 speaks to the source"
        return self.rank_0_source

    def lease_lanes(self) -> None:
        """Leases when there is room: at once after a lane has left, else at most every `poll_seconds`."""
        again = True
        while again and (self._count_free_slots() > 0 or self.slots.parked_at):
            outcome = self.process_group.broadcast_from_rank0(self._request_leases)
            self.closed = outcome.closed
            for name in outcome.leaving:
                self._remove_lane(self.lanes[name])
            for lease in outcome.leases:
                if self._count_free_slots() > 0:
                    self._start_lane(lease)
                else:  # another of them found no memory
                    self.process_group.broadcast_from_rank0(partial(self._decline_lease, lease))
            again = outcome.lease_again and bool(self.lanes)

    def _count_free_slots(self) -> int:
        return self.slots.count_free(self.lanes.values(), self.engine.max_lanes)

    def _request_leases(self) -> _LeaseOutcome:
        """Rank 0. Lanes that were parked for long count as room; when nothing else is left in the pack, lanes
        of another shape may have it."""
        now = time.monotonic()
        long_parked = self.slots.list_long_parked(now)
        group_key = next((lane.configuration.group_key for lane in self.lanes.values()), None)
        # The first lane decides the shape, and the shape how many have room.
        capacity = self._count_free_slots() + len(long_parked) if self.lanes else 1
        if capacity <= 0 or not self.poll_interval.is_due(self.leased_at, now):
            return _LeaseOutcome(closed=self.closed)
        is_any_group_key = not self.lanes
        grant = self.source.lease(group_key, capacity, self.steps_taken)
        self.leased_at = time.monotonic()
        self.poll_interval.record_answer(now, self.leased_at)
        if self.lanes and not grant.leases and len(long_parked) == len(self.lanes):
            is_any_group_key = True
            grant = self.source.lease(None, 1, self.steps_taken)
        to_train = []
        for lease in grant.leases:
            fingerprint = lease.configuration.fingerprint
            if (final_state := self.recorder.find_final_state(fingerprint)) is not None:
                self.source.end_lease(fingerprint, lease.attempt, final_state)
                self.leased_at = NEVER
            else:
                to_train.append(lease)
        # Given up for dead and leased again, to us: the newer lease counts.
        leased_again = [
            f for f in (lease.configuration.fingerprint for lease in grant.leases) if f in self.lanes
        ]
        long_parked = [name for name in long_parked if name not in leased_again]
        if (
            all(lease.configuration.group_key == group_key for lease in to_train)
            and not grant.requires_empty_group
        ):
            long_parked = long_parked[: max(0, len(to_train) - len(leased_again) - self._count_free_slots())]
        for name in long_parked:
            self._save_and_return_lease(self.lanes[name])
        if is_any_group_key and to_train:
            self.leased_at = NEVER
        return _LeaseOutcome(
            tuple(to_train),
            (*leased_again, *long_parked),
            grant.closed,
            lease_again=is_any_group_key and bool(to_train),
        )

    def _start_lane(self, lease: Lease) -> None:
        lane = self.lanes[lease.configuration.fingerprint] = Lane(lease)
        folder = self.store.checkpoints / lane.fingerprint
        found: list[Checkpoint] = []

        def find_newest() -> tuple[int, int] | None:
            """Rank 0."""
            if (newest := checkpoint.read_newest(folder, self.recorder.warn, lane.fingerprint)) is None:
                return None
            found.append(newest)
            return newest.attempt, newest.step

        attempt_and_step = self.process_group.broadcast_from_rank0(find_newest)
        path = checkpoint.checkpoint_path(folder, *attempt_and_step) if attempt_and_step is not None else None
        added = self._run_isolating_failures(
            [lane], partial(self._add_lane, saved=next(iter(found), None), path=path)
        )
        group_key = lane.configuration.group_key
        if added and group_key not in self.slots.max_lanes_by_group_key:
            read_known_max = partial(self.recorder.read_max_lanes, group_key, self.slots.count)
            self.slots.max_lanes_by_group_key[group_key] = self.process_group.broadcast_from_rank0(
                read_known_max
            )

    def _add_lane(self, lanes: Sequence[Lane], saved: Checkpoint | None, path: Path | None) -> Sequence[None]:
        """Rank 0 has found the newest checkpoint and read it; the others read the same."""
        (lane,) = lanes
        group_keys = {other.configuration.group_key for other in self.lanes.values()}
        if len(group_keys) > 1:
            raise RuntimeError(
                f"leased a lane of shape {lane.configuration.group_key} into a pack of another"
            )
        if saved is None and path is not None:
            saved = checkpoint.read(path)
        self.engine.add_lane(lane, saved)
        if saved is not None:
            self.recorder.mark_restored(lane)
        return [None]

    def _apply_directives(self) -> None:
        for fingerprint, directive in self.process_group.broadcast_from_rank0(
            self._request_directives
        ).items():
            if fingerprint in self.lanes:
                self._apply_directive(self.lanes[fingerprint], directive)

    def _request_directives(self) -> Mapping[str, Directive]:
        """Rank 0."""
        for lane in self._lanes_in(LaneState.TRAINING):
            if time.monotonic() - lane.saved_at > self.checkpoint_seconds:
                self.recorder.save_checkpoint(lane)
        now = time.monotonic()
        if not self.poll_interval.is_due(self.exchanged_at, now):
            return {}
        directives = self.source.exchange(self.steps_taken)
        self.exchanged_at = time.monotonic()
        self.poll_interval.record_answer(now, self.exchanged_at)
        return directives

    def _apply_directive(self, lane: Lane, directive: Directive) -> None:
        if directive is Directive.DROP:
            self.process_group.broadcast_from_rank0(partial(self.recorder.find_final_state, lane.fingerprint))
            self._remove_lane(lane)
        elif directive is Directive.YIELD:
            self.process_group.broadcast_from_rank0(partial(self._save_and_return_lease, lane))
            self._remove_lane(lane)
        elif directive is Directive.STOP:
            further = f", trained to step {lane.step}" if lane.step > lane.last_reported_step else ""
            self._end_lane(
                lane, "stopped", f"stopped by the scheduler after step {lane.last_reported_step}{further}"
            )
        elif directive is Directive.PARK and lane.state is not LaneState.PARKED:
            lane.transition_to(LaneState.PARKED)
            self.slots.park(lane)
        elif directive is Directive.CONTINUE and lane.state in (LaneState.PARKED, LaneState.REPORTING):
            lane.enter_next_state()
            self.slots.unpark(lane.fingerprint)

    # -- a round ----------------------------------------------------------------------------------------

    def run_round(self) -> None:
        self.busy_at = time.monotonic()
        for lane in self._lanes_in(LaneState.REPORTING):  # resumed ones owe reports
            self._send_reports(lane)
        self._apply_directives()
        busy = bool(self._lanes_in(LaneState.TRAINING) or self._lanes_in(LaneState.EVALUATING))
        self._train(self._lanes_in(LaneState.TRAINING))
        self._evaluate(self._lanes_in(LaneState.EVALUATING))
        if self.lanes and not busy:
            time.sleep(self.poll_interval.min_seconds)

    def is_idle_for(self, seconds: float) -> bool:
        return self.process_group.broadcast_from_rank0(lambda: time.monotonic() - self.busy_at > seconds)

    def _lanes_in(self, state: LaneState) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.state is state]

    def _run_isolating_failures(
        self, lanes: Sequence[Lane], work: Callable[[Sequence[Lane]], Sequence[T]]
    ) -> list[tuple[Lane, T]]:
        """`work` gives one result a lane. If it raises for several, it is done again for each alone, and only
        those for which it raises again fail. Where memory is short, it is done again for fewer."""
        if not lanes:
            return []
        try:
            results = self.process_group.run_on_all(lambda: list(zip(lanes, work(lanes), strict=True)))
        except WorkerError as error:
            failed = error.without_traceback()
        else:
            self.recorder.store_full_since = None
            return results
        # Out of the handler: the error's traceback held what the work had made.
        if failed.fault is Fault.DEVICE:
            raise failed
        if failed.fault is Fault.DISK:
            self.process_group.broadcast_from_rank0(partial(self.recorder.wait_for_space, failed))
            return self._run_isolating_failures(lanes, work)
        if failed.fault is Fault.MEMORY and len(self.lanes) > 1:
            self._shrink_lane_group()
            return self._run_isolating_failures(
                [lane for lane in lanes if lane.fingerprint in self.lanes], work
            )
        if len(lanes) == 1:
            self._fail_lane(lanes[0], failed)
            return []
        log.warning("%d lanes together: %s; now one by one", len(lanes), failed.reason)
        results = [
            one
            for lane in lanes
            if lane.fingerprint in self.lanes
            for one in self._run_isolating_failures([lane], work)
        ]
        return [(lane, one) for lane, one in results if lane.fingerprint in self.lanes]

    def _shrink_lane_group(self, mid_step: Sequence[Lane] = ()) -> None:
        """There is too little memory: half of the lanes are saved and given back, and no more than the others
        train here at once from now on. `torn` ones leave in any case, without being saved: they are half way
        through a step, and go on from their newest checkpoint."""
        free_memory()
        failed_lanes, group_key = len(self.lanes), next(iter(self.lanes.values())).configuration.group_key
        max_lanes, leaving = self.slots.halve(self.lanes.values(), mid_step)

        def return_leases() -> None:
            """Rank 0."""
            for lane in mid_step:
                self.source.return_lease(lane.fingerprint, lane.lease.attempt)
            for lane in leaving:
                self._save_and_return_lease(lane)
            self.recorder.write_max_lanes(group_key, max_lanes, failed_lanes)

        self.process_group.broadcast_from_rank0(return_leases)
        for lane in (*mid_step, *leaving):
            self._remove_lane(lane)
        free_memory()

    def _train(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        group_size = len(self.lanes)
        gradients = self._run_isolating_failures(lanes, self._compute_gradients)
        outcomes_by_rank = self.process_group.all_gather(
            [result_or_error(partial(lane.take_optimizer_step, step)) for lane, step in gradients]
        )
        diverged, mid_step = [], []
        for (lane, _), outcomes in zip(gradients, zip(*outcomes_by_rank, strict=True), strict=True):
            lane.peak_group_size = max(lane.peak_group_size, group_size)
            if failed := next((one for one in outcomes if isinstance(one, WorkerError)), None):
                if failed.fault is Fault.DEVICE:
                    raise failed
                if failed.fault is Fault.MEMORY and group_size > 1:
                    mid_step.append(lane)
                else:
                    self._fail_lane(lane, failed)
            elif outcomes[0] is not None:
                diverged.append((lane, outcomes[0]))
            else:
                self.steps_taken += 1
        if gradients:
            self.last_failure = ""
        share_elapsed_seconds(started, lanes, "train_seconds")
        for lane, reason in diverged:
            self._end_lane(lane, "diverged", reason)
        if mid_step:
            self._shrink_lane_group(mid_step)

    def _compute_gradients(self, lanes: Sequence[Lane]) -> Sequence[BackwardResult]:
        lane_group = self.engine.lane_group
        local = self.process_group.run_on_all(lambda: lane_group.backward(lanes))
        return self.process_group.all_gather(lane_group.reduce_gradients(local))[0]

    def _evaluate(self, lanes: Sequence[Lane]) -> None:
        if not lanes:
            return
        started = time.monotonic()
        evaluate = self.engine.lane_group.evaluate
        for lane, scored in self._run_isolating_failures(lanes, partial(evaluate, split="validation")):
            lane.record_scores("validation", scored)
        ending = [lane for lane in self._lanes_in(LaneState.EVALUATING) if lane.is_at_last_step]
        for lane, scored in self._run_isolating_failures(ending, partial(evaluate, split="test")):
            lane.record_scores("test", scored)
        share_elapsed_seconds(started, lanes, "evaluate_seconds")
        for lane in self._lanes_in(LaneState.EVALUATING):
            if lane.fingerprint not in self.lanes:  # it made way for another's adapter
                continue
            if reason := lane.find_nonfinite_loss():
                self._end_lane(lane, "diverged", reason)
                continue
            lane.queue_reports(after_step=lane.step - 1)
            lane.transition_to(LaneState.REPORTING)
            if not lane.is_at_last_step:
                self.process_group.broadcast_from_rank0(partial(self.recorder.save_checkpoint, lane))
                self._send_reports(lane)
            elif self._run_isolating_failures([lane], self._save_adapters):
                self._end_lane(lane, "finished")

    def _send_reports(self, lane: Lane) -> None:
        while lane.state is LaneState.REPORTING:
            report = lane.pending_reports.popleft()
            self._apply_directive(
                lane, self.process_group.broadcast_from_rank0(partial(self._send_report, report))
            )

    def _send_report(self, report: Report) -> Directive:
        """Rank 0."""
        return self.source.report(report)

    # -- ends -------------------------------------------------------------------------------------------

    def _end_lane(self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = "") -> None:
        self.process_group.broadcast_from_rank0(
            partial(self._record_end, lane, state, reason, traceback_text)
        )
        self._remove_lane(lane)

    def _record_end(self, lane: Lane, state: RecordState, reason: str, traceback_text: str) -> None:
        """Rank 0. The record first, then word to the source; a finished lane still owes its last report."""
        state = self.recorder.write_record(lane, state, reason, traceback_text)
        directives = (
            [self.source.report(report) for report in lane.pending_reports] if state == "finished" else []
        )
        if Directive.DROP not in directives:
            self.source.end_lease(lane.fingerprint, lane.lease.attempt, state)

    def _fail_lane(self, lane: Lane, failed: WorkerError) -> None:
        """The lane's own record says why. When one lane after another fails with the same words and none is
        left to take a step, it is not the lanes: a lost GPU, a base that is gone. Then this seat ends, before
        it has spoilt them all."""
        reason = failed.reason
        if failed.fault is Fault.MEMORY:
            reason = f"out of memory with one lane alone: {OUT_OF_MEMORY_ADVICE} ({reason})"
        self._end_lane(lane, "failed", reason, failed.traceback_text)
        if failed.fault is Fault.MEMORY:
            free_memory()
        if not self.lanes:
            self.engine.detach_adapters()  # it may be open on some of the workers only
        if failed.reason != self.last_failure:
            self.last_failure, self.lanes_failed_alike = failed.reason, set()
        self.lanes_failed_alike.add(lane.fingerprint)
        if len(self.lanes_failed_alike) >= MAX_IDENTICAL_FAILURES and not self.lanes:
            raise TrainerBrokenError(
                f"{len(self.lanes_failed_alike)} configurations in a row failed with {failed.reason}",
                BrokenKind.REPEATED_LANE_FAILURES,
            ) from failed

    def _remove_lane(self, lane: Lane) -> None:
        lane.transition_to(LaneState.ENDED)
        del self.lanes[lane.fingerprint]
        self.slots.unpark(lane.fingerprint)
        self.recorder.forget(lane)
        self.engine.remove_lane(lane.fingerprint)
        self.leased_at = NEVER  # there is room: ask at once

    def _decline_lease(self, lease: Lease) -> None:
        """Rank 0."""
        self.source.return_lease(lease.configuration.fingerprint, lease.attempt)

    def _save_and_return_lease(self, lane: Lane) -> None:
        """Rank 0. Whoever leases it next goes on from here; where it cannot be saved, from its newest
        checkpoint, at most an interval back."""
        self.recorder.save_checkpoint(lane)
        self.source.return_lease(lane.fingerprint, lane.lease.attempt)

    def _save_adapters(self, lanes: Sequence[Lane]) -> Sequence[None]:
        if self.save_adapter and self.process_group.rank == 0:
            for lane in lanes:
                folder = self.store.adapters / lane.fingerprint
                self.engine.save_adapter(lane.fingerprint, folder, lane.configuration.model.name)
        return [None] * len(lanes)
