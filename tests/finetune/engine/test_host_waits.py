"""The host queues a whole step without waiting for the device.

On the meta device, which has no values, each operation that would wait for a GPU raises an error: to read a
number, to branch on one, to find the labelled positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_lanes import KINDS, make_step_lanes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_step_waits_for_the_device(kind: str, checkpointing: bool) -> None:
    group, lanes = make_step_lanes(torch.device("meta"), kind, checkpointing)
    assert group.base_model.ends_with_output_layer
    losses, counts = group.backward(lanes)
    assert losses.shape == (2,)
    assert min(counts) > 0
    assert all(p.grad is not None for lane in lanes for p in lane.parameters.values())


class Transfers(TorchDispatchMode):
    """A mode that counts copies to the meta device and reads of numbers on any device."""

    copies = reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_moved = isinstance(made, Tensor) and made.is_meta and isinstance(args[0], Tensor)
        self.copies += name == "_to_copy" and is_moved and not args[0].is_meta
        self.reads += name == "_local_scalar_dense"
        return made


def test_a_micro_batch_takes_one_transfer() -> None:
    group, lanes = make_step_lanes(torch.device("meta"), "Llama")
    group.backward(lanes)  # fills caches
    first, second = group._get_loader(lanes).load([(lane.configuration.seed, lane.step) for lane in lanes])
    passes = sum(len({a.length, b.length}) for a, b in zip(first.batches, second.batches, strict=True))
    with Transfers() as seen:
        group.backward(lanes)
    assert seen.copies == passes


def test_a_step_reads_its_numbers_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group, lanes = make_step_lanes(torch.device("cpu"), "Llama")
    lists: list[int] = []
    original = Tensor.tolist
    flat, counts = group.backward(lanes)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or original(tensor))
    with Transfers() as seen:
        results = group.reduce_gradients(lanes, flat, counts)
    assert lists == [4], "two losses and two gradient norms"
    assert seen.reads == 0
    assert all(result.loss > 0 and result.gradient_norm > 0 for result in results)
