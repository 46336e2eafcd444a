"""What follows from an error: fewer lanes at once, the end of one lane, or the end of the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.finetune.engine.active_lanes import ActiveLanes
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.slots import Work
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
        self, lanes: Sequence[Lane], work: Callable[[Sequence[str]], Sequence[T]], kind: Work = "training"
    ) -> list[tuple[Lane, T]]:
        """Run `work` on the lanes together; if it raises, end only the lanes that cause it.

        An error of a lost device is raised. On a full disk the method waits for space and repeats the work.
        Work that does not fit into memory is halved: an evaluation scores half as many lanes at once, and of
        any other work the trainer gives half of its lanes back; it is then repeated. After any other error it
        is repeated for each lane alone, and a lane for which it raises again ends as `failed`.

        Args:
            lanes: The lanes to work on; may be empty.
            work: Returns one result for each lane, given by fingerprint. May be called several times.
            kind: The kind of work, whose limit it obeys.

        Returns:
            Each lane for which the work succeeded and which is still active, with its result.

        Raises:
            WorkerError: The device is lost.
            StoreFullError: The disk has stayed full for too long.
            TrainerBrokenError: One lane after another failed with the same message.
        """
        active = self.active
        lanes = [lane for lane in lanes if lane.fingerprint in active.lanes]
        if not lanes:
            return []
        at_once = active.slots.limit(kind, active.group_key)
        if kind == "evaluation" and len(lanes) > at_once:
            return self._run_in_turn(lanes, at_once, work, kind)
        try:
            results = work([lane.fingerprint for lane in lanes])
        except WorkerError as error:
            failed = error.without_traceback()
        except Exception as error:
            failed = WorkerError.from_exception(error)
        else:
            active.recorder.store_full_since = None
            return list(zip(lanes, results, strict=True))
        # Outside the except block: the traceback of `error` kept the tensors of the failed work alive.
        if failed.fault is Fault.DEVICE:
            raise failed
        if failed.fault is Fault.DISK:
            active.recorder.wait_for_space(failed)
            return self.run_isolating_failures(lanes, work, kind)
        if failed.fault is Fault.MEMORY and kind == "evaluation" and len(lanes) > 1:
            self._set_limit("evaluation", len(lanes))
            free_memory()
            return self.run_isolating_failures(lanes, work, kind)
        if failed.fault is Fault.MEMORY and len(active.lanes) > 1:
            self.halve_lane_group()
            return self.run_isolating_failures(lanes, work, kind)
        if len(lanes) == 1:
            self.fail(lanes[0], failed)
            return []
        log.warning("%d lanes together: %s; now one by one", len(lanes), failed.reason)
        return self._run_in_turn(lanes, 1, work, kind)

    def _run_in_turn(
        self, lanes: Sequence[Lane], at_once: int, work: Callable[[Sequence[str]], Sequence[T]], kind: Work
    ) -> list[tuple[Lane, T]]:
        """Call `work` for `at_once` lanes at a time; lanes that left during earlier calls are skipped."""
        results: list[tuple[Lane, T]] = []
        for first in range(0, len(lanes), at_once):
            results += self.run_isolating_failures(lanes[first : first + at_once], work, kind)
        return [(lane, result) for lane, result in results if lane.fingerprint in self.active.lanes]

    def halve_lane_group(self, mid_step: Sequence[Lane] = ()) -> None:
        """Halve the lane group after an out-of-memory error.

        Args:
            mid_step: Lanes whose optimizer step was interrupted. They leave without being saved, because
                their weights are half updated, and resume from their newest checkpoint.
        """
        free_memory()
        active = self.active
        self._set_limit("training", len(active.lanes))
        leaving = active.slots.choose_leaving(active.lanes.values(), mid_step)
        for lane in (*mid_step, *leaving):
            active.give_back(lane, save=lane in leaving)
        free_memory()

    def _set_limit(self, work: Work, failed_lanes: int) -> None:
        """Let half as many lanes of this group key do this work from now on, here and in later trainers."""
        group_key, limit = self.active.group_key or "", max(1, failed_lanes // 2)
        self.active.slots.limits[work, group_key] = limit
        self.active.recorder.write_limit(work, group_key, limit, failed_lanes)

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
