"""What follows from an error: fewer lanes at once, the end of one lane, or the end of the trainer.

After an out-of-memory error, half as many lanes work at once. The store keeps this limit for later trainers:

    root/lane_capacity/<hash of both keys>.json    {"group_key", "device_key", "training": 4, "evaluation": 2}

The device key names the device, its memory, the trainer's share of it, and the options that change how much
memory a lane needs. Each file has a checksum. If it is removed, the next trainer uses all its slots again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.engine.leasing import ActiveLanes, Work
from orchestrator.finetune.failures import BrokenKind, Fault, TrainerBrokenError, free_memory
from orchestrator.finetune.process_group import WorkerError
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_IDENTICAL_FAILURES = 3
"""The number of lanes that fail in a row with the same message before the trainer stops."""
OUT_OF_MEMORY_ADVICE = "try --gradient-checkpointing, --accumulation, a smaller --batch-size or a larger GPU"


class StoredLimits:
    """The limits of a group key on a device, as the store has them. A damaged file counts as missing.

    Args:
        folder: The store's folder of limits.
        group_key: The group key of the lanes.
        device_key: The key of the device, as described above.
    """

    def __init__(self, folder: Path, group_key: str, device_key: str) -> None:
        name = hashlib.sha256(f"{group_key} {device_key}".encode()).hexdigest()[:24]
        self.path = folder / f"{name}.json"
        self._keys = {"group_key": group_key, "device_key": device_key}

    def read(self) -> dict[Work, int]:
        """Return the known limits."""
        with suppress(OSError, ValueError, TypeError):
            content = json.loads(atomic_files.verify_checksum(self.path.read_bytes()))
            works: tuple[Work, ...] = ("training", "evaluation")
            return {work: int(content[work]) for work in works if work in content}
        return {}

    def write(self, work: Work, lanes: int) -> None:
        """Store a limit, unless the store has a smaller one.

        Args:
            work: What the limit holds for.
            lanes: The largest number of lanes that fit in memory at once.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.lock_folder(self.path.parent):
            content = self.read()
            content[work] = min(content.get(work, lanes), lanes)
            text = json.dumps({**self._keys, **content}, indent=1)
            atomic_files.write_atomically(self.path, atomic_files.add_checksum(text))


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
        elif failed.fault is Fault.MEMORY and kind == "evaluation" and len(lanes) > 1:
            self._set_limit("evaluation", len(lanes))
            free_memory()
        elif failed.fault is Fault.MEMORY and len(active.lanes) > 1:
            self.halve_lane_group()
        elif len(lanes) == 1:
            self.fail(lanes[0], failed)
            return []
        else:
            log.warning("%d lanes together: %s; now one by one", len(lanes), failed.reason)
            return self._run_in_turn(lanes, 1, work, kind)
        return self.run_isolating_failures(lanes, work, kind)

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
        staying = [lane for lane in active.lanes.values() if lane not in mid_step]
        # Lanes that have not started leave first, then parked ones, then the ones that were leased last.
        staying.sort(key=lambda lane: {LaneState.PARKED: 1, LaneState.LEASED: 2}.get(lane.state, 0))
        leaving = staying[active.slots.limit("training", active.group_key) :]
        for lane in (*mid_step, *leaving):
            active.give_back(lane, save=lane in leaving)
        free_memory()

    def _set_limit(self, work: Work, failed_lanes: int) -> None:
        """Let half as many lanes of this group key do this work from now on, here and in later trainers."""
        group_key, limit = self.active.group_key or "", max(1, failed_lanes // 2)
        self.active.slots.limits[work, group_key] = limit
        stored = self._stored_limits(group_key)
        try:
            stored.write(work, limit)
        except OSError as error:
            outcome = f"not remembered: {error}"
        else:
            outcome = f"remembered in {stored.path}"
        what = "" if work == "training" else f"{work}: "
        self.active.recorder.warn(
            f"{what}out of memory with {failed_lanes} lanes, now {limit} at once; {outcome}"
        )

    def read_limits(self, configuration: Configuration) -> None:
        """Read the memory limits of a configuration's group key from the store, once for each group key.

        A limit is a number of lanes. The trainer warns if it is smaller than its number of slots.
        """
        slots, group_key = self.active.slots, configuration.group_key
        if ("training", group_key) in slots.limits:
            return
        stored = self._stored_limits(group_key)
        found = stored.read()
        if found.get("training", slots.count) < slots.count:
            self.active.recorder.warn(
                f"at most {found['training']} lanes at once: more ran out of memory before "
                f"(remove {stored.path} to try)"
            )
        engine = self.active.engine
        tokens = engine.lane_group.count_tokens(configuration) if slots.is_automatic else 0
        useful = slots.count_useful(tokens)
        slots.limits["training", group_key] = min(found.get("training", useful), useful)
        slots.limits["evaluation", group_key] = found.get("evaluation", slots.count)

    def _stored_limits(self, group_key: str) -> StoredLimits:
        store, device_key = self.active.recorder.store, self.active.engine.device_key
        return StoredLimits(store.lane_capacity, group_key, device_key)

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
