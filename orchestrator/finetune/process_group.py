"""The workers of a trainer, which all run the same loop in step.

Each worker holds the base model and every lane, and computes its own rows of every batch. Rank 0 determines
what can differ between workers (an answer of the source, the clock, the newest checkpoint) and broadcasts it.
Work that raises on one worker fails on all. To prevent deadlocks, each worker first does its local work, then
all confirm that it succeeded, and only then they call a collective operation.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class WorkerError(RuntimeError):
    """Work raised an error on one of the workers. Every worker raises this same error.

    Args:
        reason: Type and message of the original error.
        traceback_text: Its traceback.
        fault: Its cause.
    """

    def __init__(self, reason: str, traceback_text: str, fault: Fault = Fault.LANE) -> None:
        super().__init__(reason, traceback_text, fault)  # unpickling passes these arguments
        self.reason, self.traceback_text, self.fault = reason, traceback_text, fault

    def __str__(self) -> str:
        return self.reason

    def without_traceback(self) -> WorkerError:
        """Return a copy without `__traceback__`, which keeps the tensors of the failed work alive."""
        return WorkerError(self.reason, self.traceback_text, self.fault)

    @classmethod
    def from_exception(cls, error: BaseException) -> WorkerError:
        """Return the error as other workers and the record see it: as text without secrets."""
        reason, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls(redact_secrets(reason), redact_secrets(trace), classify_error(error))


def result_or_error(work: Callable[[], T]) -> T | WorkerError:
    """Return the result of `work`, or its error as a value.

    Used before `all_gather`, where the other workers wait.
    """
    try:
        return work()
    except Exception as error:
        return WorkerError.from_exception(error)


class WorkersOutOfSyncError(RuntimeError):
    """The workers have called different collective operations, so the trainer cannot continue."""


class ProcessGroup:
    """The collective operations that the loop uses, for a single worker; `TorchProcessGroup` is for several.

    All workers must call them in the same order.
    """

    rank, world_size = 0, 1

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        """Return on every worker the result of `compute` on rank 0; the others do not call it.

        An error of `compute` is raised on rank 0 as it is, and as a WorkerError on the others.
        """
        return compute()

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all workers, by rank.

        Raises:
            WorkerError: One of the values of several workers is a WorkerError. A single worker gets it back.
            WorkersOutOfSyncError: The workers have called different collective operations.
        """
        return [value]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every worker and return this worker's result once all have succeeded.

        Raises:
            WorkerError: `work` raised an error on one of the workers.
        """
        try:
            return work()
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError.from_exception(error) from error

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum over all workers, which is bit-identical on all of them."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace the tensor, of any dtype, by the tensor of rank 0."""


SINGLE_PROCESS_GROUP = ProcessGroup()


class TorchProcessGroup(ProcessGroup):
    """The process group of an initialized torch.distributed.

    Tensors are sent with its backend, Python objects with gloo, so that they do not wait for the GPU.
    """

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        gloo = distributed.get_backend() == "gloo"
        # The others wait while rank 0 computes what is stored once, such as singular vectors of all layers.
        timeout = timedelta(seconds=timeouts.LANE_START_SECONDS)
        self._object_group = (
            distributed.group.WORLD if gloo else distributed.new_group(backend="gloo", timeout=timeout)
        )

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        """See `ProcessGroup`."""
        payload: list[Any] = [None]
        try:
            if self.rank == 0:
                payload[0] = compute()
        except BaseException as error:
            payload[0] = WorkerError.from_exception(error)
            raise
        finally:
            self._distributed.broadcast_object_list(payload, src=0, group=self._object_group)
        if isinstance(payload[0], WorkerError):
            raise payload[0]
        return payload[0]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """See `ProcessGroup`."""
        try:
            result = work()
        except (WorkerError, WorkersOutOfSyncError):  # raised by a collective operation, so on all workers
            raise
        except Exception as error:
            # This call raises the error here. The others receive it, and raise it, in their next
            # `all_gather`: inside `work`, or the one below.
            self.all_gather(WorkerError.from_exception(error))
        self.all_gather(None, "the end of an attempt")
        return result

    def all_reduce_(self, tensor: Tensor) -> None:
        """See `ProcessGroup`."""
        self._distributed.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """See `ProcessGroup`."""
        self._distributed.broadcast(tensor, src=0)

    def all_gather(self, value: T, call_site: str = "a value") -> list[T]:
        """See `ProcessGroup`; `call_site` must be the same on all workers."""
        gathered: list[Any] = [None] * self.world_size
        self._distributed.all_gather_object(gathered, (call_site, value), group=self._object_group)
        for _, received in gathered:
            if isinstance(received, WorkerError):
                raise received
        call_sites = [site for site, _ in gathered]
        if len(set(call_sites)) > 1:
            raise WorkersOutOfSyncError(f"the trainer's workers are at {', '.join(call_sites)}")
        return [received for _, received in gathered]
