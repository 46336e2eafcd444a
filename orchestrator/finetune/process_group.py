"""The workers of a trainer: rank 0 runs the loop, and the others carry out its commands.

Each worker holds the base model and every lane, and computes its own rows of every batch. A command, such as
a step or an evaluation, is a method of the engine that is marked with `on_all_workers`. When rank 0 calls it,
its name and arguments are broadcast. The other workers wait in `follow` and call the same method of their
engines. Within a command, workers exchange values by `all_gather` and tensors by `all_reduce_`. A command
that raises an error on one worker raises it on all. A worker copies tensors to its device with
`copy_without_waiting`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from orchestrator.finetune.failures import Fault, classify_error, free_memory
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")


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

    @classmethod
    def from_exception(cls, error: BaseException) -> WorkerError:
        """Return the error as other workers and the record see it: as text without secrets.

        The result has no `__traceback__`, which keeps the tensors of the failed work alive.
        """
        if isinstance(error, WorkerError):
            return cls(error.reason, error.traceback_text, error.fault)
        reason, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls(redact_secrets(reason), redact_secrets(trace), classify_error(error))


def result_or_error(work: Callable[[], T]) -> T | WorkerError:
    """Return the result of `work`, or its error as a value."""
    try:
        return work()
    except Exception as error:
        return WorkerError.from_exception(error)


class ProcessGroup:
    """The communication of a trainer's workers, for a single worker; `TorchProcessGroup` is for several."""

    rank, world_size = 0, 1

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all workers, by rank. All of them call this method.

        Raises:
            WorkerError: A worker has failed since the last call.
        """
        return [value]

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum over all workers, which is bit-identical on all of them."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace the tensor, of any dtype, by the tensor of rank 0."""

    def run(self, work: Callable[[], T]) -> T:
        """Run `work`, which all workers run, and return this worker's result once all have succeeded.

        Raises:
            WorkerError: `work` raised an error on one of several workers. A single worker raises it as it is.
        """
        return work()

    def send_command(self, command: tuple[str, Any] | None) -> None:
        """Send a command to the other workers; None ends their `follow`. Rank 0 only."""

    def follow(self, target: object) -> None:
        """Carry out the commands of rank 0 on `target`, until they end. Other ranks only.

        Raises:
            WorkerError: A worker has lost its device, or the connection to the others.
        """


SINGLE_PROCESS_GROUP = ProcessGroup()


def on_all_workers(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Make a method a command: rank 0 calls it, and every worker runs it.

    The object has an attribute `process_group`, and the other workers hold an object of the same class. The
    arguments are pickled. A command must not call another command.
    """

    @wraps(method)
    def command(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs, "arguments are sent by position"
        self.process_group.send_command((method.__name__, args))
        return self.process_group.run(lambda: method(self, *args, **kwargs))

    return command


class TorchProcessGroup(ProcessGroup):
    """The process group of an initialized torch.distributed.

    Tensors are sent with its backend, Python objects with gloo, so that they do not wait for the GPU.
    """

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        timeout = timedelta(seconds=timeouts.WORKER_WAIT_SECONDS)
        self._object_group = distributed.new_group(backend="gloo", timeout=timeout)

    def all_gather(self, value: T) -> list[T]:
        """See `ProcessGroup`."""
        gathered: list[Any] = [None] * self.world_size
        self._distributed.all_gather_object(gathered, value, group=self._object_group)
        for received in gathered:
            if isinstance(received, WorkerError):
                raise received
        return gathered

    def all_reduce_(self, tensor: Tensor) -> None:
        """See `ProcessGroup`."""
        self._distributed.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """See `ProcessGroup`."""
        self._distributed.broadcast(tensor, src=0)

    def run(self, work: Callable[[], T]) -> T:
        """See `ProcessGroup`."""
        try:
            result = work()
        except WorkerError:  # of `all_gather`, so raised on all workers
            raise
        except Exception as error:
            # This call raises the error here. The others receive it, and raise it, in their next
            # `all_gather`: inside `work`, or the one below.
            self.all_gather(WorkerError.from_exception(error))
        self.all_gather(None)
        return result

    def send_command(self, command: tuple[str, Any] | None) -> None:
        """See `ProcessGroup`."""
        self._distributed.broadcast_object_list([command], src=0, group=self._object_group)

    def follow(self, target: object) -> None:
        """See `ProcessGroup`."""
        while True:
            received: list[Any] = [None]
            self._distributed.broadcast_object_list(received, src=0, group=self._object_group)
            if received[0] is None:
                return
            name, arguments = received[0]
            fault = None
            try:
                self.run(partial(getattr(type(target), name).__wrapped__, target, *arguments))
            except WorkerError as error:  # rank 0 handles it
                if error.fault is Fault.DEVICE:
                    raise
                fault = error.fault
            if fault is Fault.MEMORY:  # outside of the except block, whose error keeps tensors alive
                free_memory()


def copy_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; if the device is the CPU, return the tensor itself.

    The copy to a GPU is made from pinned memory: from other memory, PyTorch would wait until the GPU has
    finished all earlier work.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
