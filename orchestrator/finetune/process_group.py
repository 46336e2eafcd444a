"""The workers of a seat, which all run the same loop in step.

Each holds the base and every lane, and computes its rows of every batch. What is not the same everywhere (a
source's answer, the clock, the newest checkpoint) rank 0 finds out and all are told; what raises on one
worker fails on all. So that none waits for another in vain, work of one's own comes first, then the agreement
that it went well, then what needs all of them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class WorkerError(RuntimeError):
    """Work of the team raised on a worker. The same on every worker."""

    def __init__(self, reason: str, traceback_text: str, fault: Fault = Fault.LANE) -> None:
        super().__init__(reason, traceback_text, fault)  # as it is pickled
        self.reason, self.traceback_text, self.fault = reason, traceback_text, fault

    def __str__(self) -> str:
        return self.reason

    def without_traceback(self) -> WorkerError:
        """The same without a traceback, which holds all that the work had at hand."""
        return WorkerError(self.reason, self.traceback_text, self.fault)

    @classmethod
    def from_exception(cls, error: BaseException) -> WorkerError:
        """What the other workers, and the record, get to know of an error."""
        reason, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls(redact_secrets(reason), redact_secrets(trace), classify_error(error))


def result_or_error(work: Callable[[], T]) -> T | WorkerError:
    """What it returns, or as a value what it raises: for `gather`, where the others wait."""
    try:
        return work()
    except Exception as error:
        return WorkerError.from_exception(error)


class WorkersOutOfSyncError(RuntimeError):
    """The workers are at different places of the loop: this seat cannot go on."""


class ProcessGroup(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        """What `value` gives on rank 0, which alone calls it. What it raises ends the loop on all."""
        ...

    def all_gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. Raises Failed when a worker raised before it came here."""
        ...

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Everybody's own result of `work`. Raises Failed on all when it raises on any."""
        ...

    def all_reduce_(self, tensor: Tensor) -> None:
        """Adds everybody's `tensor` up, in place; afterwards all hold the same bits."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Give all workers the `tensor` of rank 0, in place, whatever its dtype."""
        ...


class SingleProcessGroup:
    """A seat of one worker, or none at all."""

    rank, world_size = 0, 1

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        return compute()

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def run_on_all(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError.from_exception(error) from error

    def all_reduce_(self, tensor: Tensor) -> None:
        pass

    def broadcast_(self, tensor: Tensor) -> None:
        pass


class TorchProcessGroup:
    """The processes of an initialised torch.distributed. Tensors go by its backend, objects by gloo, so that
    no GPU is waited for."""

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        gloo = distributed.get_backend() == "gloo"
        self._object_group = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo")

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
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

    def all_gather(self, value: T) -> list[T]:
        return self._all_gather("a value", value)

    def run_on_all(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except (WorkerError, WorkersOutOfSyncError):  # all know it already
            raise
        except Exception as error:
            # Wherever in `work` the others are, their next gathering, or the one below, meets this one.
            self._all_gather("", WorkerError.from_exception(error))
        self._all_gather("the end of an attempt", None)
        return result

    def all_reduce_(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        self._distributed.broadcast(tensor, src=0)

    def _all_gather(self, call_site: str, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.world_size
        self._distributed.all_gather_object(gathered, (call_site, value), group=self._object_group)
        for _, theirs in gathered:
            if isinstance(theirs, WorkerError):
                raise theirs
        if len({theirs for theirs, _ in gathered}) > 1:
            raise WorkersOutOfSyncError(
                f"the seat's workers are at {', '.join(theirs for theirs, _ in gathered)}"
            )
        return [theirs for _, theirs in gathered]


SINGLE_PROCESS_GROUP = SingleProcessGroup()
