"""The fine-tuning loop of a trainer: it leases lanes, trains them and writes their records.

Each round leases lanes for the free slots, applies the directives of the source, takes one optimizer step
with every lane in training, and evaluates the lanes that are at an evaluation step. Lanes join and leave at
any round and do not influence each other.

The loop runs on rank 0 of the trainer's workers. The other workers carry out the commands of its engine
(`process_group.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.engine.lane_source import Directive, LaneSource, Lease
from orchestrator.finetune.engine.leasing import NEVER, ActiveLanes, LaneSlots
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.finetune.engine.recovery import FailureRecovery
from orchestrator.finetune.failures import (
    BrokenKind,
    Fault,
    StoreFullError,
    TrainerBrokenError,
    classify_error,
)
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup, WorkerError
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from orchestrator.util import timeouts

log = logging.getLogger(__name__)

BaseModelLoader = Callable[[ModelChoice, Task], BaseModel]


def run(
    source: LaneSource | None,
    store: Store,
    load_base_model: BaseModelLoader,
    slots: LaneSlots,
    *,
    adapters: Path | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    make_engine: Callable[..., Engine] = Engine,
) -> None:
    """Train the lanes that a source leases, until the source has no more or none has come for a while.

    All workers of a trainer call this function with the same arguments, except for the source. A lane that
    fails ends alone, with a `failed` record. When memory runs out, fewer lanes train at once. An error of the
    source or of the store ends the loop. Another trainer then resumes the lanes from their checkpoints.

    Args:
        source: The source of lanes, which receives the reports. Only rank 0 uses it.
        store: The store for checkpoints, adapters and records.
        load_base_model: Loads a base model for a task.
        slots: The slots of the trainer, which limit how many lanes train at once.
        adapters: The folder in which the adapters of finished lanes are kept; None to keep none.
        process_group: The workers of this trainer.
        make_engine: Makes the engine, which computes steps and scores, from the arguments of `Engine`.

    Raises:
        TrainerBrokenError: This process can train no more lanes.
        StoreFullError: The disk has been full for STORE_FULL_SECONDS. All leases were given back.
    """
    on_batch = source.note_progress if source is not None else lambda: None
    engine = make_engine(load_base_model, store.calibration, store.data, process_group, on_batch)
    try:
        if process_group.rank > 0:
            process_group.follow(engine)
        else:
            assert source is not None, "rank 0 has the source"
            recorder = LaneRecorder(store, engine, source.notify, adapters)
            _run_until_idle(ActiveLanes(source, engine, recorder, slots))
    except BaseException as error:
        if classify_error(error) is Fault.DEVICE:
            reason = f"the device is lost to this process: {error}"
            raise TrainerBrokenError(reason, BrokenKind.DEVICE_LOST) from error
        if isinstance(error, StoreFullError) and source is not None:
            for lane in engine.lanes.values():
                source.return_lease(lane.fingerprint, lane.lease.attempt)
        engine.close()
        raise
    engine.close()


def _run_until_idle(active: ActiveLanes) -> None:
    """Run rounds until the source is closed, or no lane has been held for IDLE_TRAINER_SECONDS."""
    rounds = TrainingRounds(active, FailureRecovery(active))
    while True:
        rounds.lease_lanes()
        if active.lanes:
            rounds.run()
        elif active.closed or time.monotonic() - rounds.busy_at > timeouts.IDLE_TRAINER_SECONDS:
            return
        else:
            time.sleep(timeouts.SOURCE_POLL_SECONDS)


def process_start() -> float:
    """Return the start of this process on the clock of `time.monotonic`."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


@dataclass
class TrainingRounds:
    """The rounds in which a trainer trains its lanes, evaluates them and reports their scores."""

    active: ActiveLanes
    recovery: FailureRecovery
    exchanged_at: float = NEVER
    """The time at which the source last answered a request for directives."""
    busy_at: float = field(default_factory=time.monotonic)
    """The time at which the last round began."""
    counted_until: float = field(default_factory=process_start)
    """The time of the last division of seconds among lanes. All seconds before it have been divided."""
    has_started: bool = False
    """Whether any lane has been trained or evaluated since the start of the process."""

    def run(self) -> None:
        """Run one round over all lanes."""
        active = self.active
        self.busy_at = time.monotonic()
        for lane in active.in_state(LaneState.REPORTING):  # a resumed lane repeats its reports
            self._send_reports(lane)
        active.recorder.save_due_checkpoint(active.in_state(LaneState.TRAINING, LaneState.PARKED))
        self._exchange()
        busy = bool(active.in_state(LaneState.TRAINING, LaneState.EVALUATING))
        if training := active.in_state(LaneState.TRAINING):
            self._train(training)
        if evaluating := active.in_state(LaneState.EVALUATING):
            self._evaluate(evaluating)
        if active.lanes and not busy:
            time.sleep(timeouts.SOURCE_POLL_SECONDS)

    # -- leases -----------------------------------------------------------------------------------------

    def lease_lanes(self) -> None:
        """Lease lanes if there is room: at once after a lane has left, else at the poll interval."""
        active, again = self.active, True
        while again:
            free = active.count_free_slots()  # the first lane may change it
            active.source.note_max_lanes(free + len(active.lanes))
            if free <= 0 and not active.slots.parked_at:
                return
            to_start, again = active.request_leases()
            for lease in to_start:
                if active.count_free_slots() > 0:
                    self._start_lane(lease)
                else:  # a lane before this one ran out of memory, and the group was halved
                    active.source.return_lease(lease.configuration.fingerprint, lease.attempt)
            again = again and bool(active.lanes)

    def _start_lane(self, lease: Lease) -> None:
        """Put a leased lane on the model, resumed from its newest checkpoint if there is one."""
        active, lane = self.active, Lane(lease)
        active.lanes[lane.fingerprint] = lane
        checkpoints = active.recorder.store.checkpoints / lane.fingerprint
        checkpoint = tensor_files.find_newest(checkpoints, active.recorder.warn, lane.fingerprint)

        def add_lane(fingerprints: Sequence[str]) -> Sequence[None]:
            group_key = lane.configuration.group_key
            if group_key != active.group_key:  # that of the first lane
                raise RuntimeError(f"leased a lane of group key {group_key} into a lane group of another one")
            active.engine.add_lane(lane, checkpoint)
            if checkpoint is not None:
                active.recorder.mark_saved(lane)
            return [None]

        if self.recovery.run_isolating_failures([lane], add_lane):
            lane.enter_next_state()
            self.recovery.read_limits(lane.configuration)

    # -- time -------------------------------------------------------------------------------------------

    def _charge(self, lanes: Collection[Lane], kind: str) -> None:
        """Add the seconds since the last call, in equal shares, to the lanes.

        Args:
            lanes: The lanes that the time was used for; at least one.
            kind: A field of `Cost`, such as "train_seconds".
        """
        now = time.monotonic()
        for lane in lanes:
            lane.seconds[kind] += (now - self.counted_until) / len(lanes)
        self.counted_until = now

    def _charge_waiting(self) -> None:
        """Add the seconds since the last step or evaluation to all lanes, as start time or as other time."""
        self._charge(self.active.lanes.values(), "other_seconds" if self.has_started else "start_seconds")
        self.has_started = True

    # -- directives -------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Ask the source for directives if that is due, and apply them."""
        active, now = self.active, time.monotonic()
        if not active.is_request_due(self.exchanged_at, now):
            return
        directives = active.source.exchange(active.steps_taken)
        self.exchanged_at = time.monotonic()
        active.latency = self.exchanged_at - now
        for fingerprint, directive in directives.items():
            if fingerprint in active.lanes:
                self._apply(directive, active.lanes[fingerprint])

    def _apply(self, directive: Directive, lane: Lane) -> None:
        """Carry out the source's directive for a lane."""
        active = self.active
        if directive is Directive.DROP:
            # Removes the checkpoints of a lane that another trainer has ended.
            active.recorder.find_final_state(lane.fingerprint)
            active.remove(lane)
        elif directive is Directive.YIELD:
            active.give_back(lane)
        elif directive is Directive.STOP:
            reported = lane.last_reported_step
            further = f", trained to step {lane.step}" if lane.step > reported else ""
            active.end(lane, "stopped", f"stopped by the scheduler after step {reported}{further}")
        elif directive is Directive.PARK and lane.state is not LaneState.PARKED:
            lane.transition_to(LaneState.PARKED)
            active.slots.parked_at[lane.fingerprint] = time.monotonic()
        elif directive is Directive.CONTINUE and lane.state in (LaneState.PARKED, LaneState.REPORTING):
            lane.enter_next_state()
            active.slots.parked_at.pop(lane.fingerprint, None)

    def _send_reports(self, lane: Lane) -> None:
        """Send the lane's pending reports in order, until a directive takes it out of `REPORTING`."""
        while lane.state is LaneState.REPORTING:
            self._apply(self.active.source.report(lane.pending_reports.popleft()), lane)

    # -- steps ------------------------------------------------------------------------------------------

    def _train(self, lanes: Sequence[Lane]) -> None:
        """Take one optimizer step with each lane."""
        active = self.active
        self._charge_waiting()
        group_size = len(active.lanes)
        outcomes = self.recovery.run_isolating_failures(lanes, active.engine.step)
        self._note_peak_memory()
        diverged, mid_step = [], []
        for lane, outcome in outcomes:
            lane.peak_group_size = max(lane.peak_group_size, group_size)
            if isinstance(outcome, WorkerError):
                if outcome.fault is Fault.DEVICE:
                    raise outcome
                if outcome.fault is Fault.MEMORY and group_size > 1:
                    mid_step.append(lane)
                else:
                    self.recovery.fail(lane, outcome)
            elif outcome is not None:
                diverged.append((lane, outcome))
            else:
                active.steps_taken += 1
                if lane.step in lane.evaluation_steps:
                    lane.transition_to(LaneState.EVALUATING)
        if outcomes:
            self.recovery.last_failure = ""  # a lane has taken a step
        self._charge(lanes, "train_seconds")
        for lane, reason in diverged:
            active.end(lane, "diverged", reason)
        if mid_step:
            self.recovery.halve_lane_group(mid_step)

    def _note_peak_memory(self) -> None:
        """Raise the peak memory of every lane to that since the last call."""
        peak = self.active.engine.take_peak_memory()
        for lane in self.active.lanes.values():
            lane.peak_memory = max(lane.peak_memory, peak)

    # -- evaluations ------------------------------------------------------------------------------------

    def _evaluate(self, lanes: Sequence[Lane]) -> None:
        """Score the lanes on the splits that are due, and report the scores."""
        active = self.active
        self._charge_waiting()
        for split in active.engine.lane_group.data.splits:
            due = [lane for lane in lanes if lane.state is LaneState.EVALUATING and lane.is_due(split)]
            evaluate = partial(active.engine.evaluate, split)
            for lane, scored in self.recovery.run_isolating_failures(due, evaluate, "evaluation"):
                lane.record_scores(split, scored)
        self._charge(lanes, "evaluate_seconds")
        self._note_peak_memory()
        for lane in lanes:
            # Computing the base model's scores for another lane can run out of memory and evict this one.
            if lane.state is LaneState.EVALUATING:
                self._conclude_evaluation(lane)

    def _conclude_evaluation(self, lane: Lane) -> None:
        """Report the new scores; end a lane that has diverged or is at its last step."""
        active = self.active
        if reason := lane.find_nonfinite_loss():
            active.end(lane, "diverged", reason)
            return
        lane.queue_reports(after_step=lane.step - 1)
        lane.transition_to(LaneState.REPORTING)
        if not lane.is_at_last_step:
            active.recorder.save_due_checkpoint([lane])
            self._send_reports(lane)
        elif self.recovery.run_isolating_failures([lane], self._complete_baseline_scores):
            active.end(lane, "finished")

    def _complete_baseline_scores(self, fingerprints: Sequence[str]) -> Sequence[None]:
        """Complete the scores of the base model, which the lanes' records need."""
        self.active.engine.complete_baseline_scores(wait=True)
        return [None] * len(fingerprints)
