"""One round of the fine-tuning loop: reports, directives, one optimizer step, evaluations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import psutil

from orchestrator.finetune.engine.active_lanes import NEVER, ActiveLanes
from orchestrator.finetune.engine.answer_wait import AnswerWait, sum_generate_seconds
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.engine.recovery import FailureRecovery
from orchestrator.finetune.engine.slots import LaneMemory
from orchestrator.finetune.failures import Fault
from orchestrator.finetune.process_group import WorkerError, result_or_error
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

SAMPLED_ROWS = 256
"""The number of training rows whose mean length counts."""


def process_start() -> float:
    """Return the start of this process on the clock of `time.monotonic`."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


@dataclass
class LaneTimer:
    """A timer that divides all time since the start of the process, without gaps, among the lanes.

    Attributes:
        counted_until: The time up to which seconds have been divided, on the monotonic clock.
        has_started: True once a lane has been worked on.
    """

    counted_until: float = field(default_factory=process_start)
    has_started: bool = False

    def add(self, lanes: Sequence[Lane], kind: str) -> None:
        """Add the seconds since the last call, in equal shares, to the lanes.

        Args:
            lanes: The lanes that the time was used for. If there is none, the time is added at the next call.
            kind: A field of `Cost`, such as "train_seconds".
        """
        if not lanes:
            return
        now = time.monotonic()
        for lane in lanes:
            lane.seconds[kind] += (now - self.counted_until) / len(lanes)
        self.counted_until = now

    def begin_work(self, lanes: Sequence[Lane]) -> None:
        """Charge the lanes with the time since the last step or evaluation, before the next one begins."""
        self.add(lanes, "other_seconds" if self.has_started else "start_seconds")
        self.has_started = self.has_started or bool(lanes)


@dataclass
class TrainingRounds:
    """The rounds in which a trainer trains its lanes, evaluates them and reports their scores."""

    active: ActiveLanes
    recovery: FailureRecovery
    exchanged_at: float = NEVER
    """The time at which the source last answered a request for directives."""
    busy_at: float = field(default_factory=time.monotonic)
    """The time at which the last round began."""
    lane_timer: LaneTimer = field(default_factory=LaneTimer)
    answer_wait: AnswerWait = field(default_factory=AnswerWait)

    def run(self) -> None:
        """Run one round over all lanes."""
        active = self.active
        self.busy_at = time.monotonic()
        for lane in active.in_state(LaneState.REPORTING):  # a resumed lane repeats its reports
            self._send_reports(lane)
        self._exchange()
        busy = bool(active.in_state(LaneState.TRAINING) or active.in_state(LaneState.EVALUATING))
        if training := active.in_state(LaneState.TRAINING):
            with self.answer_wait.measure_steps():
                self._train(training)
        self._evaluate(self._choose_lanes_to_evaluate())
        if active.lanes and not busy:
            time.sleep(timeouts.SOURCE_POLL_SECONDS)

    def is_idle(self) -> bool:
        """Return whether no round has begun for IDLE_TRAINER_SECONDS, by the clock of rank 0."""
        return self.active.process_group.broadcast_from_rank0(
            lambda: time.monotonic() - self.busy_at > timeouts.IDLE_TRAINER_SECONDS
        )

    # -- directives -------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Ask the source for directives, and apply them."""
        directives = self.active.process_group.broadcast_from_rank0(self._request_directives)
        for fingerprint, directive in directives.items():
            if fingerprint in self.active.lanes:
                self._apply(directive, self.active.lanes[fingerprint])

    def _request_directives(self) -> Mapping[str, Directive]:
        """Start to write a checkpoint if one is due, and request directives if that is due. Rank 0 only."""
        active = self.active
        # A lane in EVALUATING waits for others to have its answers generated with theirs.
        states = LaneState.TRAINING, LaneState.PARKED, LaneState.EVALUATING
        self._start_due_checkpoint([lane for state in states for lane in active.in_state(state)])
        now = time.monotonic()
        if not active.poll_interval.is_due(self.exchanged_at, now):
            return {}
        directives = active.source.exchange(active.steps_taken)
        self.exchanged_at = time.monotonic()
        active.poll_interval.record_answer(now, self.exchanged_at)
        return directives

    def _start_due_checkpoint(self, lanes: Sequence[Lane]) -> None:
        """Start to save the lane with the oldest checkpoint among those that are due. Rank 0 only."""
        recorder = self.active.recorder
        recorder.note_finished_write()
        is_due, lane_count = recorder.checkpoint_schedule.is_due, len(self.active.lanes)
        due = [
            lane
            for lane in lanes
            if not recorder.is_saved(lane)
            and is_due(lane, lane_count, is_first=not recorder.was_saved_here(lane))
        ]
        if due:
            recorder.start_checkpoint(min(due, key=lambda lane: lane.saved_at))

    def _apply(self, directive: Directive, lane: Lane) -> None:
        """Carry out the source's directive for a lane."""
        active = self.active
        if directive is Directive.DROP:
            # Removes the checkpoints of a lane that another trainer has ended.
            active.process_group.broadcast_from_rank0(
                partial(active.recorder.find_final_state, lane.fingerprint)
            )
            active.remove(lane)
        elif directive is Directive.YIELD:
            active.process_group.broadcast_from_rank0(partial(active.save_and_return_lease, lane))
            active.remove(lane)
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
            report = lane.pending_reports.popleft()
            directive = self.active.process_group.broadcast_from_rank0(partial(self._send_report, report))
            self._apply(directive, lane)

    def _send_report(self, report: Report) -> Directive:
        """Send a report to the source, and return the directive for its lane. Rank 0 only."""
        return self.active.source.report(report)

    # -- steps ------------------------------------------------------------------------------------------

    def _train(self, lanes: Sequence[Lane]) -> None:
        """Take one optimizer step with each lane."""
        active = self.active
        self.lane_timer.begin_work(list(active.lanes.values()))
        group_size = len(active.lanes)
        self._note_peak_memory()  # the peak of the step itself is measured below
        gradients = self.recovery.run_isolating_failures(lanes, self._compute_gradients)
        outcomes_by_rank = active.process_group.all_gather(
            [result_or_error(partial(lane.take_optimizer_step, step)) for lane, step in gradients]
        )
        measure_memory(active, [lane for lane, _ in gradients], self._note_peak_memory())
        diverged, mid_step = [], []
        for (lane, _), outcomes in zip(gradients, zip(*outcomes_by_rank, strict=True), strict=True):
            lane.peak_group_size = max(lane.peak_group_size, group_size)
            if failed := next((one for one in outcomes if isinstance(one, WorkerError)), None):
                if failed.fault is Fault.DEVICE:
                    raise failed
                if failed.fault is Fault.MEMORY and group_size > 1:
                    mid_step.append(lane)
                else:
                    self.recovery.fail(lane, failed)
            elif outcomes[0] is not None:
                diverged.append((lane, outcomes[0]))
            else:
                active.steps_taken += 1
        if gradients:
            self.recovery.last_failure = ""  # a lane has taken a step
        self.lane_timer.add(lanes, "train_seconds")
        for lane, reason in diverged:
            active.end(lane, "diverged", reason)
        if mid_step:
            self.recovery.halve_lane_group(mid_step)

    def _note_peak_memory(self) -> int:
        """Raise the peak memory of every lane to that of the last step or evaluation, and return the peak."""
        peak = self.active.engine.take_peak_memory()
        for lane in self.active.lanes.values():
            lane.peak_memory = max(lane.peak_memory, peak)
        return peak

    def _compute_gradients(self, lanes: Sequence[Lane]) -> Sequence[BackwardResult]:
        """Compute the lanes' gradients, summed over all workers, and return each lane's loss and norm."""
        process_group, lane_group = self.active.process_group, self.active.engine.lane_group
        local = process_group.run_on_all(lambda: lane_group.backward(lanes))
        return process_group.all_gather(lane_group.reduce_gradients(lanes, *local))[0]

    # -- evaluations ------------------------------------------------------------------------------------

    def _choose_lanes_to_evaluate(self) -> list[Lane]:
        """Return the lanes to evaluate now, without those at their last step that wait for others.

        A lane that waits stays in `EVALUATING`, so every round decides again.
        """
        active = self.active
        due, training = active.in_state(LaneState.EVALUATING), active.in_state(LaneState.TRAINING)
        if not (due and training):
            return due
        lane_group = active.engine.lane_group
        ended = [lane for lane in due if lane.is_at_last_step and lane_group.generates_answers(lane)]
        if not ended:
            return due
        waits = active.process_group.broadcast_from_rank0(
            partial(self.answer_wait.is_worthwhile, training)
        ) and len(ended) < lane_group.count_lanes_generated_together("test")
        return [lane for lane in due if lane not in ended] if waits else due

    def _evaluate(self, lanes: Sequence[Lane]) -> None:
        """Score the lanes on validation, and those with `is_test_due` on test too, and report the scores."""
        if not lanes:
            return
        active, seconds_before = self.active, sum_generate_seconds(lanes)
        self.lane_timer.begin_work(list(active.lanes.values()))
        run_isolating_failures = self.recovery.run_isolating_failures
        evaluate = active.engine.lane_group.evaluate
        for lane, scored in run_isolating_failures(lanes, partial(evaluate, split="validation"), True):
            lane.record_scores("validation", scored)
        due = [lane for lane in lanes if lane.state is LaneState.EVALUATING and lane.is_test_due]
        for lane, scored in run_isolating_failures(due, partial(evaluate, split="test"), True):
            lane.record_scores("test", scored)
        self.lane_timer.add(lanes, "evaluate_seconds")
        self.answer_wait.record_generation(lanes, seconds_before)
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
            active.process_group.broadcast_from_rank0(partial(self._start_due_checkpoint, [lane]))
            self._send_reports(lane)
        elif self.recovery.run_isolating_failures([lane], self._complete_baseline_scores):
            active.end(lane, "finished")

    def _complete_baseline_scores(self, lanes: Sequence[Lane]) -> Sequence[None]:
        """Complete the scores of the base model, which the lanes' records need."""
        self.active.engine.lane_group.load_or_compute_baseline_scores(wait=True)
        return [None] * len(lanes)


def measure_memory(active: ActiveLanes, lanes: Sequence[Lane], peak: int) -> None:
    """Measure a step of the whole lane group, and set the number of lanes once it follows from the steps.

    All workers call this after each step. The worker with the largest peak and the one with the least memory
    decide.

    Args:
        active: The lanes of the trainer.
        lanes: The lanes that took the step.
        peak: The peak memory of this worker during the step, in bytes.
    """
    slots, engine = active.slots, active.engine
    if not lanes or len(lanes) < len(active.lanes) or not slots.needs_measurement(lanes):
        return
    group_key = lanes[0].configuration.group_key
    known = slots.memory_by_group_key.setdefault(group_key, LaneMemory())
    gathered = active.process_group.all_gather((peak, engine.memory_limit))
    known.peaks[len(lanes)].append(max(one for one, _ in gathered))
    if known.is_known(1) and known.is_known(2):
        tokens = _count_tokens(engine.lane_group, lanes[0].configuration)
        measured = known.choose(min(limit for _, limit in gathered), tokens)
        slots.max_lanes_by_group_key[group_key] = measured.lanes
        active.process_group.broadcast_from_rank0(
            partial(active.recorder.write_measured_lanes, group_key, measured)
        )


def _count_tokens(lane_group: LaneGroup, configuration: Configuration) -> int:
    """Return the mean number of tokens or image patches in a micro-batch of a lane, without padding."""
    train, batches = lane_group.data.train, configuration.batches
    rows = [train[index] for index in range(min(len(train), SAMPLED_ROWS))]
    config = lane_group.base_model.model.config
    config = getattr(config, "vision_config", None) or config  # of CLIP
    patches = (getattr(config, "image_size", 0) // getattr(config, "patch_size", 1)) ** 2
    lengths = [min(len(row.ids), batches.max_length) if row.image is None else patches for row in rows]
    return round(sum(lengths) / len(lengths) * batches.batch_size)
