"""Low-rank and dense updates: values, gradients, kept memory, and independence of lanes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.forward_context import draw_dropout_masks
from variants.optimization.dora import DoRA
from variants.rank.hira import HiRA
from variants.testing.rig import (
    CASES,
    ROWS,
    Case,
    LaneOptimizer,
    attach_lanes,
    calibrate_lane,
    lane_inputs,
    lane_outputs,
    model_output,
    perturb_lanes,
    tensors_equal,
    train,
)

LANES = 2


@contextmanager
def keep_saved() -> Iterator[list[Tensor]]:
    """Collect the tensors that autograd keeps for the backward pass."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("variant", ["lora", "pissa", "lora_fa"])
def test_only_the_input_the_hidden_values_and_computed_factors_are_kept(variant: str) -> None:
    """The lane's own tensors, such as LoRA's A, are not counted; s B is computed.

    PiSSA's factors and hidden values have twice the rank. Where A does not learn (LoRA-FA), the input is not
    kept.
    """
    case = Case("low rank", out_features=40, in_features=24)
    adapters = attach_lanes(case, catalogue.get(variant), 1, VariantSettings(3, 6.0))
    layer = adapters.model.there[0]  # type: ignore[union-attr,index]
    x = lane_inputs(case, adapters.lanes).requires_grad_()
    with adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS), keep_saved() as kept:
        layer(x)
    of_lane = [*adapters.trainable("0").values(), *adapters.frozen("0").values()]
    resident = {t.untyped_storage().data_ptr() for t in [*adapters.model.parameters(), *of_lane]}
    own = Counter(t.numel() for t in kept if t.untyped_storage().data_ptr() not in resident)
    rank = 6 if variant == "pissa" else 3
    factors = [6 * 24, 40 * 6] if variant == "pissa" else [40 * 3]
    inputs = [] if variant == "lora_fa" else [x.numel()]
    assert own == Counter([*factors, *inputs, rank * x.numel() // 24, 1])  # 1: the factor s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "rank"), [(8, 2), (40, 4), (192, 8), (192, 128)])
@pytest.mark.parametrize(
    ("name", "names"), [("lora", "A B"), ("pissa", "A B A0 B0"), ("dora", "A B m n"), ("vera", "A B b d")]
)
def test_a_lane_has_the_same_bits_alone_and_among_others(
    name: str, names: str, rows: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    variant, layer = catalogue.get(name), FrozenLayer("layer", torch.randn(96, 64).to(dtype), None)
    shapes = {"A": (rank, 64), "A0": (rank, 64), "B": (96, rank), "B0": (96, rank), "d": (rank,)}
    tensors = {key: torch.randn(3, *shapes.get(key, (96,))) for key in names.split()}
    x, noise = torch.randn(3, rows, 64).to(dtype), torch.randn(3, rows, 96).to(dtype)
    scale = torch.tensor([2.0, 3.0, 0.1]).view(-1, 1, 1)

    def compute(lanes: slice) -> list[Tensor]:
        own = {key: t[lanes].clone().requires_grad_() for key, t in {**tensors, "x": x}.items()}
        lane_layer = replace(layer, scaling=scale[lanes])
        base = torch.nn.functional.linear(own["x"], layer.weight)
        prepared = variant.prepare({key: own[key] for key in tensors}, lane_layer)
        out = variant.forward(own["x"], base, prepared, lane_layer)
        return [out.detach(), *torch.autograd.grad(out, list(own.values()), noise[lanes])]

    together = compute(slice(None))
    for lane in range(3):
        for one, several in zip(compute(slice(lane, lane + 1)), together, strict=True):
            assert torch.equal(one[0], several[lane])


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "vera", "hira"])
def test_lanes_without_dropout_train_as_they_do_alone(name: str, case: Case) -> None:
    """The law of independent lanes trains with dropout, where the frozen layer is called separately."""
    grouped = attach_lanes(case, catalogue.get(name), 3)
    train(case, grouped, steps=3)
    for lane in grouped.lanes:
        alone = attach_lanes(case, catalogue.get(name), 0)
        alone.add_lane(lane, alone.settings, int(lane), calibrate_lane(case, alone, int(lane)))
        train(case, alone, steps=3)
        assert tensors_equal(grouped.trainable(lane), alone.trainable(lane))


def test_a_second_derivative_through_a_hand_written_node_is_refused() -> None:
    case = Case("dense")
    adapters = attach_lanes(case, catalogue.get("hira"), 1)
    x = lane_inputs(case, adapters.lanes).requires_grad_()
    with adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS):
        loss = model_output(adapters.model, x).square().sum()
    with pytest.raises(RuntimeError, match="a second derivative through an adapted layer"):
        torch.autograd.grad(loss, x, create_graph=True)


class Doubled(HiRA):
    """HiRA with a forward pass of its own, which doubles the update."""

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return base + 2 * (super().forward(x, base, params, layer) - base)


def test_a_subclass_with_its_own_forward_pass_is_not_bypassed() -> None:
    case = Case("dense")
    outputs = []
    for variant in (HiRA(), Doubled()):
        adapters = attach_lanes(case, variant, 1)
        with torch.no_grad():
            for parameter in adapters.trainable("0").values():
                parameter.fill_(0.1)
        outputs.append(lane_outputs(case, adapters))
    assert not torch.equal(*outputs)


class CountCasts(TorchDispatchMode):
    """A mode that counts casts of tensors with a lane dimension."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].dim() == 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "salora", "vera"])
def test_factors_are_rounded_once_for_all_tokens(variant: str) -> None:
    """Each token that is generated calls every layer."""
    case = Case("tokens", dtype=torch.bfloat16)
    adapters = attach_lanes(case, catalogue.get(variant), LANES)
    perturb_lanes(case, adapters)
    inputs = lane_inputs(case, adapters.lanes)
    with adapters.activate_lanes(adapters.lanes, None), torch.no_grad():
        with CountCasts() as first:
            expected = model_output(adapters.model, inputs)
        with CountCasts() as second:
            output = model_output(adapters.model, inputs)
    assert (first.count > 0, second.count) == (True, 0)
    assert torch.equal(output, expected)


# The layer of a dense update: gradients, number of products of full size, and kept memory.


FULL_IN, FULL_OUT, FULL_RANK = 24, 40, 3


class CountFullProducts(TorchDispatchMode):
    """A mode that counts matrix products with a factor or result of shape (FULL_OUT, FULL_IN).

    Products with A or B are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            rows, columns = args[-2:]
            sizes = {*rows.shape[-2:], *columns.shape[-2:]}
            lanes = len(rows) if rows.dim() == 3 else 1
            self.count += lanes * ({FULL_IN, FULL_OUT} <= sizes and FULL_RANK not in sizes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_equal_numerical_ones(has_base: bool, is_transposed: bool) -> None:
    """`is_transposed`: the module stores (in, out), as Conv1D does."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3).double(), torch.randn(4).double()
    if is_transposed:
        weight = weight.t().contiguous().t()
    shapes = [(2, 5, 3), (2, 5, 4), (2, 2, 3), (2, 4, 2)]
    x, base, a, b = (torch.randn(shape).double().requires_grad_() for shape in shapes)

    def product(x: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layer = FrozenLayer("layer", weight, bias).with_settings(
            VariantSettings(2, None), torch.ones(2, 1, 1)
        )
        inputs = {"A": a, "B": b}, layer
        hira = catalogue.get("hira")
        return hira.forward(x, base, *inputs) if has_base else hira.forward_with_base(x, *inputs)

    expected = x @ (weight * (b @ a)).mT + (base if has_base else x @ weight.T + bias)
    torch.testing.assert_close(product(x, base, a, b), expected)
    assert torch.autograd.gradcheck(product, (x, base, a, b))


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, 3), (torch.bfloat16, 5)])
def test_a_lane_takes_three_products_of_full_size_and_keeps_only_x_and_its_factors(
    dtype: torch.dtype, products: int
) -> None:
    """A lane has one product forward and two backward. In bfloat16 the frozen layer adds one to each pass."""
    case = Case("dense", out_features=FULL_OUT, in_features=FULL_IN, dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("hira"), LANES, VariantSettings(FULL_RANK, None))
    layer = adapters.model.there[0]  # type: ignore[union-attr,index]
    x = lane_inputs(case, adapters.lanes).requires_grad_()
    with CountFullProducts() as counter, adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS):
        with keep_saved() as kept:
            out = layer(x)
        out.sum().backward()
    base_products = 2 if products == 5 else 0  # the base's products are over the rows of all lanes
    assert counter.count == LANES * 3 + base_products
    weight = layer.base_layer.weight
    own = Counter(t.numel() for t in kept if t.untyped_storage().data_ptr() != weight.data_ptr())
    assert own == {x.numel(): 1, LANES * FULL_RANK * FULL_IN: 1, LANES * FULL_RANK * FULL_OUT: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_input_of_the_update_alone(dtype: torch.dtype) -> None:
    case = Case("dense", dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("hira"), 1, VariantSettings(4, None, dropout=0.5))
    perturb_lanes(case, adapters)
    layer, x = adapters.layers["there.0"], case.rows(0)
    with torch.no_grad(), adapters.activate_lanes(["0"], 0) as context:
        out = layer(x)
        context.mask_draws.clear()
    with torch.no_grad():
        mask = draw_dropout_masks(x.view(1, -1, 32), 0.5, "there.0", context, adapters.state.seeds)
        a, b = (adapters.trainable("0")[f"there.0.{name}"] for name in "AB")
        weight = layer.frozen_layer.weight.double()
        update = (x.view(1, -1, 32) * mask).double() @ (weight * (b.double() @ a.double())).T
        expected = x.double() @ weight.T + update.view(x.shape)
    assert (out.double() - expected).norm() < case.tolerance * expected.norm()


# DoRA's row norms are computed once for each value of a lane's parameters, and never outdated.


NORMS_CASE = Case("norms")
NORM_LAYERS = 4


class CountingDoRA(DoRA):
    """DoRA that counts the lanes and layers whose norms it computes."""

    def __init__(self) -> None:
        self.computed = 0

    def gradient_constants(self, params: Params, layer: FrozenLayer) -> Params:
        self.computed += len(layer.scaling)
        return super().gradient_constants(params, layer)


def test_norms_are_computed_once_a_step_and_lane_whatever_lanes_share_a_micro_batch() -> None:
    variant = CountingDoRA()
    adapters = attach_lanes(NORMS_CASE, variant, 3)
    optimizers = [LaneOptimizer(adapters, lane, 0.01, 2) for lane in adapters.lanes]
    for step in range(2):
        variant.computed = 0
        for micro_batch, groups in enumerate([(("0", "1", "2"),), (("0", "2"), ("1",)), (("2", "1", "0"),)]):
            for lanes in groups:
                with adapters.activate_lanes(lanes, step, micro_batch, rows_per_lane=ROWS):
                    model_output(adapters.model, lane_inputs(NORMS_CASE, lanes)).square().mean().backward()
        assert variant.computed == 3 * NORM_LAYERS
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    variant.computed = 0
    for _ in range(2):  # batches of an evaluation
        lane_outputs(NORMS_CASE, adapters)
    assert variant.computed == 3 * NORM_LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lane_of_an_old_name_has_its_own_norms(dtype: torch.dtype) -> None:
    case = Case("norms", dtype=dtype)
    adapters = attach_lanes(case, DoRA(), 1)
    first = lane_outputs(case, adapters)
    tensors = {name: tensor + 0.1 for name, tensor in adapters.trainable("0").items()}
    adapters.remove_lane("0")
    adapters.restore_lane("0", tensors, {}, VariantSettings(rank=4, alpha=8.0))
    restored = lane_outputs(case, adapters)
    fresh = attach_lanes(case, DoRA(), 0)
    fresh.restore_lane("0", tensors, {}, VariantSettings(rank=4, alpha=8.0))
    assert torch.equal(restored, lane_outputs(case, fresh))
    assert not torch.equal(restored, first)


def test_blocks_of_rows_give_the_norms_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, blocks = (attach_lanes(NORMS_CASE, DoRA(), 2) for _ in range(2))
    expected = lane_outputs(NORMS_CASE, whole)
    monkeypatch.setattr("variants.optimization.dora.CAST_NUMEL", 7 * NORMS_CASE.in_features)
    assert torch.equal(lane_outputs(NORMS_CASE, blocks), expected)
