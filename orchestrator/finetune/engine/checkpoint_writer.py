"""When checkpoints are written, and writes of them in a thread while the lanes train on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.finetune.engine import checkpoint as checkpoint_files
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.failures import is_file_not_found
from orchestrator.util import timeouts

MAX_PINNED_BYTES = 2**30
"""Size of the largest checkpoint that is copied to pinned memory, which stays reserved for the process."""
MEAN_SECONDS_BETWEEN_FAILURES = 24 * 3600.0
"""Assumed mean time between two failures of a trainer that lose the steps since the last checkpoints. The
drain of a node, as after a spot notice, is no such failure: the trainer saves its lanes first. A wrong
assumption costs little: with four times as many failures, the best interval is half as long."""


@dataclass
class CheckpointSchedule:
    """The schedule of lanes' checkpoints by Young's formula (Young 1974, CACM 17); times in seconds.

    If all lanes of a trainer are saved every T seconds, which takes C seconds, and a failure comes every M
    seconds, then C / T of the time goes into writing, and T / (2 M) is lost by failures. The sum is least at
    T = sqrt(2 C M).
    """

    write_seconds: float = 0.0
    """Duration of the last write of one lane; 0 before the first one and after one that failed, so that the
    next attempt follows after the shortest interval."""

    def compute_interval(self, lane_count: int) -> float:
        """Return the interval between two checkpoints of a lane.

        Args:
            lane_count: The lanes of the trainer.
        """
        optimum = math.sqrt(2 * self.write_seconds * lane_count * MEAN_SECONDS_BETWEEN_FAILURES)
        return min(max(optimum, timeouts.MIN_CHECKPOINT_SECONDS), timeouts.MAX_CHECKPOINT_SECONDS)

    def is_due(self, lane: Lane, lane_count: int, is_first: bool) -> bool:
        """Return whether the interval has passed since the lane's start or last checkpoint.

        Args:
            lane: The lane.
            lane_count: The lanes of the trainer.
            is_first: Whether the lane has not been saved since this trainer leased it. It is then saved after
                the shortest interval, so that a study whose trainers die every few minutes makes progress.
        """
        interval = timeouts.MIN_CHECKPOINT_SECONDS if is_first else self.compute_interval(lane_count)
        return time.monotonic() - lane.saved_at >= interval


@dataclass(frozen=True)
class WriteResult:
    """The result of writing a checkpoint."""

    fingerprint: str
    progress: tuple[int, int]
    """Steps and evaluations in the checkpoint."""
    seconds: float
    """Duration of the write, without the copy."""
    error: Exception | None


class CheckpointWriter:
    """A writer of checkpoints below a folder, one at a time.

    Args:
        folder: The store's folder of checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[str, Future[WriteResult]] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a write has been started whose result has not been taken."""
        return self._pending is not None

    def start(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint and start to write it, after `take_result` has returned the previous result.

        Args:
            checkpoint: The state; its tensors may change after this call.

        Raises:
            MemoryError, RuntimeError: There is no memory for the copy.
        """
        assert self._pending is None, "the result of the last write was not taken"
        copy, wait_for_copy = copy_to_host(checkpoint)
        future = self._executor.submit(self.write, copy, wait_for_copy)
        self._pending = (checkpoint.fingerprint, future)

    def take_result(self, fingerprint: str = "", wait: bool = True) -> WriteResult | None:
        """Return the result of the last started write; each result is returned once.

        Args:
            fingerprint: The lane whose result to return; empty for any lane.
            wait: Whether to wait for its end.

        Returns:
            The result; None if there is no such write, or it has not ended and `wait` is false.
        """
        if self._pending is None or fingerprint not in ("", self._pending[0]):
            return None
        if not (wait or self._pending[1].done()):
            return None
        result = self._pending[1].result()
        self._pending = None
        return result

    def close(self) -> None:
        """Wait for a write that is running, and end the thread."""
        self._executor.shutdown()

    def write(self, checkpoint: Checkpoint, wait_for_copy: Callable[[], None] = lambda: None) -> WriteResult:
        """Write a checkpoint in the calling thread.

        Args:
            checkpoint: The state; its tensors do not change during the call.
            wait_for_copy: Called first; returns when the tensors have their values.

        Returns:
            The result. An error of the write is part of it and is not raised.
        """
        folder, error = self.folder / checkpoint.fingerprint, None
        started = time.monotonic()
        try:
            wait_for_copy()
            started = time.monotonic()
            try:
                checkpoint_files.write(folder, checkpoint)
            except (OSError, SafetensorError) as missing:
                if not is_file_not_found(missing):
                    raise
                # Another trainer has ended this lane and removed the folder, which happens once at most; this
                # trainer will receive DROP for the lane.
                checkpoint_files.write(folder, checkpoint)
        except Exception as raised:  # of any type: the training thread decides, see `LaneRecorder`
            error = raised
        progress = (checkpoint.step, len(checkpoint.state.get("evaluations", ())))
        return WriteResult(checkpoint.fingerprint, progress, time.monotonic() - started, error)


def copy_to_host(checkpoint: Checkpoint) -> tuple[Checkpoint, Callable[[], None]]:
    """Copy the tensors of a checkpoint to host memory.

    From a GPU they are copied into pinned memory, behind the kernels that are queued there; this function
    does not wait for them.

    Returns:
        The copy, and a function that returns when its tensors have their values.
    """
    parts = (checkpoint.trainable, checkpoint.frozen, *checkpoint.moments.values())
    tensors = [tensor for part in parts for tensor in part.values()]
    pin = sum(tensor.nbytes for tensor in tensors) <= MAX_PINNED_BYTES

    def copy(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _copy_tensor(tensor.detach(), pin) for name, tensor in part.items()}

    copied = replace(
        checkpoint,
        trainable=copy(checkpoint.trainable),
        frozen=copy(checkpoint.frozen),
        moments={moment: copy(part) for moment, part in checkpoint.moments.items()},
    )
    if not any(tensor.is_cuda for tensor in tensors):
        return copied, lambda: None
    event = torch.cuda.Event()
    event.record()
    return copied, event.synchronize


def _copy_tensor(tensor: Tensor, pin: bool) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin and tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
