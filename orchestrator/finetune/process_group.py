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

from orchestrator.finetune.failures import Fault, fault_of
from orchestrator.util.redaction import without_secrets

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Failed(RuntimeError):
    """Work of the team raised on a worker. The same on every worker."""

    def __init__(self, reason: str, trace: str, fault: Fault = Fault.LANE) -> None:
        super().__init__(reason, trace, fault)  # as it is pickled
        self.reason, self.trace, self.fault = reason, trace, fault

    def __str__(self) -> str:
        return self.reason

    def bare(self) -> Failed:
        """The same without a traceback, which holds all that the work had at hand."""
        return Failed(self.reason, self.trace, self.fault)

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """What the other workers, and the record, get to know of an error."""
        reason, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls(without_secrets(reason), without_secrets(trace), fault_of(error))


def caught(work: Callable[[], T]) -> T | Failed:
    """What it returns, or as a value what it raises: for `gather`, where the others wait."""
    try:
        return work()
    except Exception as error:
        return Failed.of(error)


class OutOfStep(RuntimeError):
    """The workers are at different places of the loop: this seat cannot go on."""


class Team(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, value: Callable[[], T]) -> T:
        """What `value` gives on rank 0, which alone calls it. What it raises ends the loop on all."""
        ...

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. Raises Failed when a worker raised before it came here."""
        ...

    def attempt(self, work: Callable[[], T]) -> T:
        """Everybody's own result of `work`. Raises Failed on all when it raises on any."""
        ...

    def sum_(self, tensor: Tensor) -> None:
        """Adds everybody's `tensor` up, in place; afterwards all hold the same bits."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Give all workers the `tensor` of rank 0, in place, whatever its dtype."""
        ...


class Alone:
    """A seat of one worker, or none at all."""

    rank, size = 0, 1

    def agree(self, value: Callable[[], T]) -> T:
        return value()

    def gather(self, value: T) -> list[T]:
        return [value]

    def attempt(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Failed:
            raise
        except Exception as error:
            raise Failed.of(error) from error

    def sum_(self, tensor: Tensor) -> None:
        pass

    def broadcast_(self, tensor: Tensor) -> None:
        pass


class TorchTeam:
    """The processes of an initialised torch.distributed. Tensors go by its backend, objects by gloo, so that
    no GPU is waited for."""

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        gloo = distributed.get_backend() == "gloo"
        self._objects = distributed.group.WORLD if gloo else distributed.new_group(backend="gloo")

    def agree(self, value: Callable[[], T]) -> T:
        told: list[Any] = [None]
        try:
            if self.rank == 0:
                told[0] = value()
        except BaseException as error:
            told[0] = Failed.of(error)
            raise
        finally:
            self._distributed.broadcast_object_list(told, src=0, group=self._objects)
        if isinstance(told[0], Failed):
            raise told[0]
        return told[0]

    def gather(self, value: T) -> list[T]:
        return self._gather("a value", value)

    def attempt(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except (Failed, OutOfStep):  # all know it already
            raise
        except Exception as error:
            # Wherever in `work` the others are, their next gathering, or the one below, meets this one.
            self._gather("", Failed.of(error))
        self._gather("the end of an attempt", None)
        return result

    def sum_(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        self._distributed.broadcast(tensor, src=0)

    def _gather(self, what: str, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._distributed.all_gather_object(found, (what, value), group=self._objects)
        for _, theirs in found:
            if isinstance(theirs, Failed):
                raise theirs
        if len({theirs for theirs, _ in found}) > 1:
            raise OutOfStep(f"the seat's workers are at {', '.join(theirs for theirs, _ in found)}")
        return [theirs for _, theirs in found]


ALONE = Alone()
