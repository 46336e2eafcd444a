"""The lanes' tensors are slices of one tensor for each name, and gradients of stacks reach each lane."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from variants import catalogue
from variants.api import StepHooks, Variant, baddbmm, bmm
from variants.lane_tensors import LaneTensors
from variants.testing.rig import (
    CASES,
    ROWS,
    LaneOptimizer,
    attach_lanes,
    lane_inputs,
    lane_outputs,
    model_output,
    tensors_equal,
    train,
)

CPU = torch.device("cpu")
LANES = ("a", "b", "c", "d")


class WritesF(StepHooks, Variant):
    """A variant whose hooks write the frozen tensor "f"."""

    mutable_buffers = frozenset({"f"})


def make_lanes(lanes: Sequence[str] = LANES) -> LaneTensors:
    """Return lanes with a parameter "w" and a frozen tensor "f" of random values."""
    tensors = LaneTensors(WritesF())
    for lane in lanes:
        add_lane(tensors, lane)
    return tensors


def add_lane(tensors: LaneTensors, lane: str) -> None:
    generator = torch.Generator().manual_seed(ord(lane))
    w, f = (torch.randn(3, 5, generator=generator) for _ in range(2))
    tensors.add_lane(lane, {"w": w}, {"f": f}, CPU)


def slices_of(stacked: Tensor) -> list[int]:
    """Return the address of each lane's slice."""
    return [one.data_ptr() for one in stacked]


def test_a_parameter_stays_the_same_object_when_lanes_come_and_go() -> None:
    tensors = make_lanes(("a", "b"))
    parameter, value = tensors.trainable["b"]["w"], tensors.trainable["b"]["w"].detach().clone()
    tensors.stack(("a", "b"))
    add_lane(tensors, "c")
    tensors.stack(("a", "b", "c"))
    tensors.remove_lane("a")
    stack = tensors.stack(("b", "c"))
    assert tensors.trainable["b"]["w"] is parameter
    assert torch.equal(parameter, value)
    with torch.no_grad():
        parameter.mul_(2)
        tensors.frozen["b"]["f"].fill_(7)
    assert torch.equal(stack["w"][0], 2 * value)
    assert (tensors.stack(("b", "c"))["f"][0] == 7).all()


@pytest.mark.parametrize("lanes", [("b", "c"), ("d",), ("a", "c"), ("d", "a", "b")])
def test_a_stack_of_some_lanes_has_their_values_after_every_write(lanes: tuple[str, ...]) -> None:
    tensors = make_lanes()
    tensors.stack(LANES)
    for _ in range(2):
        for name, own in (("w", tensors.trainable), ("f", tensors.frozen)):
            assert torch.equal(tensors.stack(lanes)[name], torch.stack([own[lane][name] for lane in lanes]))
        assert tensors.stack(lanes)["w"] is tensors.stack(lanes)["w"]
        with torch.no_grad():
            for lane in LANES:
                tensors.trainable[lane]["w"].add_(1)
                tensors.frozen[lane]["f"].add_(1)


@pytest.mark.parametrize(
    "groups",
    [
        [LANES, LANES],
        [("a", "b"), LANES],
        [LANES, ("d", "a"), ("b", "c"), LANES],
        [("a",), ("c", "b"), ("d",), ("b", "c")],
        [("c",)],
    ],
)
def test_gradients_equal_those_of_separate_parameters(groups: Sequence[tuple[str, ...]]) -> None:
    """Gradients are equal bit for bit, with the sign of zeros, and None for lanes without a gradient.

    Every group of lanes uses its stack twice, as layers that share their tensors do.
    """
    tensors = make_lanes()
    separate = {lane: t["w"].detach().clone().requires_grad_() for lane, t in tensors.trainable.items()}
    for number, lanes in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        factors = torch.randn(2, len(lanes), 3, 5, generator=generator)
        factors[:, :, 0] = -0.0
        both = [[tensors.stack(lanes)["w"] for _ in range(2)]]
        both += [[torch.stack([separate[lane] for lane in lanes]) for _ in range(2)]]
        for first, second in both:
            (first * factors[0] + (second * factors[1]).square()).sum().backward()
    for lane, expected in separate.items():
        found = tensors.trainable[lane]["w"].grad
        assert (found is None) == (expected.grad is None)
        if found is not None and expected.grad is not None:
            assert torch.equal(found, expected.grad)
            assert torch.equal(found.signbit(), expected.grad.signbit())


@pytest.mark.parametrize("lanes", [("0",), ("1", "2"), ("0", "1", "2")])
@pytest.mark.parametrize("name", ["lora", "dora", "hira"])
def test_a_step_between_the_passes_is_an_error(name: str, lanes: tuple[str, ...]) -> None:
    """The graph has the stack: without an error, gradients would be computed from the new values."""
    case = CASES[0]
    adapters = attach_lanes(case, catalogue.get(name), 3)
    train(case, adapters, 2)  # so that every tensor has an influence
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, 2) for lane in lanes}
    with adapters.activate_lanes(lanes, 0, rows_per_lane=ROWS):
        x = lane_inputs(case, lanes)
        model_output(adapters.model, x).square().sum().backward()
        late = model_output(adapters.model, x).square().sum()
    optimizers[lanes[-1]].step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_product_that_keeps_its_factors_has_the_gradients_from_before_a_step() -> None:
    """PiSSA's factors contain the frozen copies too, so the graph does not have the stack."""
    case = CASES[0]
    adapters = attach_lanes(case, catalogue.get("pissa"), 3)
    train(case, adapters, 2)
    optimizer = LaneOptimizer(adapters, "1", 0.01, 2)
    with adapters.activate_lanes(["1"], 0, rows_per_lane=ROWS):
        loss = model_output(adapters.model, lane_inputs(case, ["1"])).square().sum()
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        found.append({name: p.grad.clone() for name, p in adapters.trainable("1").items()})
        optimizer.step()
    assert tensors_equal(*found)


def test_the_last_lane_does_not_keep_the_memory_of_the_others() -> None:
    tensors = make_lanes()
    tensors.stack(LANES)
    parameter, value = tensors.trainable["b"]["w"], tensors.trainable["b"]["w"].detach().clone()
    for lane in ("a", "c", "d"):
        tensors.remove_lane(lane)
    stack = tensors.stack(("b",))
    for tensor in (parameter, tensors.frozen["b"]["f"], stack["w"], stack["f"]):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tensors.trainable["b"]["w"] is parameter
    assert torch.equal(parameter, value)
    assert slices_of(stack["w"]) == [parameter.data_ptr()]


@pytest.mark.parametrize("lanes", [("0", "1", "2"), ("0", "2")])
@pytest.mark.parametrize("name", ["lora", "vera", "dora"])
def test_lanes_train_after_an_evaluation_in_inference_mode(name: str, lanes: tuple[str, ...]) -> None:
    case = CASES[0]
    evaluated, other = (attach_lanes(case, catalogue.get(name), 3) for _ in range(2))
    with torch.inference_mode():
        lane_outputs(case, evaluated, lanes)
    for adapters in (evaluated, other):
        with adapters.activate_lanes(lanes, 0, rows_per_lane=ROWS):
            model_output(adapters.model, lane_inputs(case, lanes)).square().sum().backward()
    for lane in lanes:
        for parameter, expected in zip(
            evaluated.trainable(lane).values(), other.trainable(lane).values(), strict=True
        ):
            assert parameter.grad is not None
            assert expected.grad is not None
            assert torch.equal(parameter.grad, expected.grad)


# Batch-invariant products give the same bits for every batch size.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(4, 40, 24), (24, 40, 4), (40, 4, 24), (40, 24, 1), (40, 1, 24), (40, 1, 1)]
)
def test_a_batch_of_one_equals_one_of_several(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = sizes
    noise = torch.Generator().manual_seed(0)
    for _ in range(500):
        x = torch.randn(3, rows, inner, generator=noise).to(dtype)
        y = torch.randn(3, inner, columns, generator=noise).to(dtype)
        base = torch.randn(3, rows, columns, generator=noise).to(dtype)
        assert torch.equal(bmm(x, y)[:1], bmm(x[:1], y[:1]))
        assert torch.equal(baddbmm(base, x, y)[:1], baddbmm(base[:1], x[:1], y[:1]))
