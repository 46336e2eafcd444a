"""Recovery from errors: isolate the lane that fails, halve the lane group, or stop the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from orchestrator.finetune.engine.active_lanes import ActiveLanes
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.failures import BrokenKind, Fault, TrainerBrokenError, free_memory
from orchestrator.finetune.process_group import WorkerError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_IDENTICAL_FAILURES = 3
"""The number of lanes that fail in a row with the same message before the trainer stops."""
OUT_OF_MEMORY_ADVICE = "try --gradient-checkpointing, --accumulation, a smaller --batch-size or a larger GPU"


@dataclass
class FailureRecovery:
    """A handler of failures: it ends one lane, halves the lane group, or stops the trainer."""

    active: ActiveLanes
    last_failure: str = ""
    """The reason of the last failed lane; empty again after any optimizer step."""
    lanes_failed_alike: set[str] = field(default_factory=set)
    """Fingerprints of the lanes that failed in a row with `last_failure`."""

    def run_isolating_failures(
        self,
        lanes: Sequence[Lane],
        work: Callable[[Sequence[Lane]], Sequence[T]],
        can_split: bool = False,
    ) -> list[tuple[Lane, T]]:
        """Run `work` on the lanes together; if it raises, end only the lanes that cause it.

        An error of a lost device is raised. On a full disk the method waits for space and repeats the work.
        After an out-of-memory error the work is split if it can be, else the lane group is halved; the work
        is then repeated for the remaining lanes. After any other error the work is repeated for each lane
        alone, and a lane for which it raises again ends as `failed`.

        Args:
            lanes: The lanes to work on; may be empty.
            work: Returns one result for each lane. May be called several times.
            can_split: Whether the work may be done for a part of the lanes at a time. After an out-of-memory
                error it is then done for half as many lanes at once, and a lane leaves only if the work does
                not fit for one lane at a time. The number is remembered for later work of this kind.

        Returns:
            Each lane for which the work succeeded and which is still active, with its result.

        Raises:
            WorkerError: The device is lost.
            StoreFullError: The disk has stayed full for too long.
            TrainerBrokenError: One lane after another failed with the same message.
        """
        if not lanes:
            return []
        active, max_split = self.active, self.active.slots.max_lanes_to_evaluate(lanes[0])
        if can_split and len(lanes) > max_split:
            parts = [lanes[first : first + max_split] for first in range(0, len(lanes), max_split)]
            return self._run_in_turn(parts, work, can_split)
        try:
            results = active.process_group.run_on_all(lambda: list(zip(lanes, work(lanes), strict=True)))
        except WorkerError as error:
            failed = error.without_traceback()
        else:
            active.recorder.store_full_since = None
            return results
        # Outside the except block: the traceback of `error` kept the tensors of the failed work alive.
        if failed.fault is Fault.DEVICE:
            raise failed
        if failed.fault is Fault.DISK:
            active.process_group.broadcast_from_rank0(partial(active.recorder.wait_for_space, failed))
            return self.run_isolating_failures(lanes, work, can_split)
        if failed.fault is Fault.MEMORY and can_split and len(lanes) > 1:
            self._halve_evaluation(lanes)
            return self.run_isolating_failures(lanes, work, can_split)
        if failed.fault is Fault.MEMORY and len(active.lanes) > 1:
            self.halve_lane_group()
            remaining = [lane for lane in lanes if lane.fingerprint in active.lanes]
            return self.run_isolating_failures(remaining, work, can_split)
        if len(lanes) == 1:
            self.fail(lanes[0], failed)
            return []
        log.warning("%d lanes together: %s; now one by one", len(lanes), failed.reason)
        return self._run_in_turn([[lane] for lane in lanes], work, can_split)

    def _halve_evaluation(self, lanes: Sequence[Lane]) -> None:
        """Let evaluations score half as many lanes of this group key at once as `lanes`, from now on."""
        max_lanes = len(lanes) // 2
        self.active.slots.evaluated_lanes_by_group_key[lanes[0].configuration.group_key] = max_lanes
        log.warning("evaluation: out of memory with %d lanes, now %d at once", len(lanes), max_lanes)
        free_memory()

    def _run_in_turn(
        self,
        parts: Sequence[Sequence[Lane]],
        work: Callable[[Sequence[Lane]], Sequence[T]],
        can_split: bool,
    ) -> list[tuple[Lane, T]]:
        """Call `work` once for each part of the lanes; lanes that left during earlier calls are skipped."""
        active = self.active
        results: list[tuple[Lane, T]] = []
        for part in parts:
            remaining = [lane for lane in part if lane.fingerprint in active.lanes]
            results += self.run_isolating_failures(remaining, work, can_split)
        return [(lane, result) for lane, result in results if lane.fingerprint in active.lanes]

    def halve_lane_group(self, mid_step: Sequence[Lane] = ()) -> None:
        """Halve the lane group after an out-of-memory error, and remember the new maximum in the store.

        Args:
            mid_step: Lanes whose optimizer step was interrupted. They leave without being saved, because
                their weights are half updated, and resume from their newest checkpoint.
        """
        free_memory()
        active = self.active
        failed_lanes, group_key = len(active.lanes), next(iter(active.lanes.values())).configuration.group_key
        max_lanes, leaving = active.slots.halve(active.lanes.values(), mid_step)

        def return_leases() -> None:
            """Give back the leases of the lanes that leave, and store the new maximum. Rank 0 only."""
            for lane in mid_step:
                active.return_lease(lane.lease)
            for lane in leaving:
                active.save_and_return_lease(lane)
            active.recorder.write_max_lanes(group_key, max_lanes, failed_lanes)

        active.process_group.broadcast_from_rank0(return_leases)
        for lane in (*mid_step, *leaving):
            active.remove(lane)
        free_memory()

    def fail(self, lane: Lane, failed: WorkerError) -> None:
        """End the lane as `failed`.

        Raises:
            TrainerBrokenError: `MAX_IDENTICAL_FAILURES` lanes in a row failed with the same message and no
                lane is left. The cause is then the machine, for example a lost GPU or a missing base model,
                and this trainer would fail all lanes that it leases.
        """
        active, reason = self.active, failed.reason
        if failed.fault is Fault.MEMORY:
            reason = f"out of memory with one lane alone: {OUT_OF_MEMORY_ADVICE} ({reason})"
        active.end(lane, "failed", reason, failed.traceback_text)
        if failed.fault is Fault.MEMORY:
            free_memory()
        if not active.lanes:
            active.engine.detach_adapters()  # the error may have left a lane group on some workers only
        if failed.reason != self.last_failure:
            self.last_failure, self.lanes_failed_alike = failed.reason, set()
        self.lanes_failed_alike.add(lane.fingerprint)
        if len(self.lanes_failed_alike) >= MAX_IDENTICAL_FAILURES and not active.lanes:
            raise TrainerBrokenError(
                f"{len(self.lanes_failed_alike)} configurations in a row failed with {failed.reason}",
                BrokenKind.REPEATED_LANE_FAILURES,
            ) from failed
