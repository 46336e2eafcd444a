"""The products of the LoRA family as one node: values, gradients, kept memory, and independence of lanes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.baseline.lora import LoRA
from variants.low_rank import LowRank, LowRankProduct
from variants.testing.rig import (
    CASES,
    ROWS,
    Case,
    attach_lanes,
    calibrate_lane,
    lane_inputs,
    lane_outputs,
    model_output,
    perturb_lanes,
    tensors_equal,
    train,
)

LANES, N, IN, OUT, RANK = 2, 5, 3, 4, 2


def _layer(is_transposed: bool, has_bias: bool) -> FrozenLayer:
    """Return a float64 layer; if `is_transposed`, its module stores (in, out), as Conv1D does."""
    weight = torch.randn(OUT, IN).double()
    if is_transposed:
        weight = weight.t().contiguous().t()
    return FrozenLayer("layer", weight, torch.randn(OUT).double() if has_bias else None)


def _base(x: Tensor, layer: FrozenLayer) -> Tensor:
    return x @ layer.weight.mT + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("scaled_and_frozen", [(False, False), (True, False), (True, True)])
def test_low_rank_gradients_equal_numerical_ones(
    is_transposed: bool, has_bias: bool, has_more: bool, scaled_and_frozen: tuple[bool, bool]
) -> None:
    torch.manual_seed(0)
    layer, (is_scaled, has_frozen) = _layer(is_transposed, has_bias), scaled_and_frozen
    shapes = [(LANES, N, IN), (LANES, RANK, IN), (LANES, OUT, RANK), (LANES, 1, OUT)]
    x, a, b, more = (torch.randn(shape).double().requires_grad_() for shape in shapes)
    scale = torch.tensor([2.0, 3.0]).double().view(-1, 1, 1) if is_scaled else None
    a0, b0 = (torch.randn_like(a).detach(), torch.randn_like(b).detach()) if has_frozen else (None, None)

    def product(x: Tensor, a: Tensor, b: Tensor, more: Tensor) -> Tensor:
        return LowRankProduct.apply(x, a, b, more if has_more else None, (scale, a0, b0), layer)

    update = b @ a - (0 if a0 is None or b0 is None else b0 @ a0)
    expected = _base(x, layer) + x @ ((1 if scale is None else scale) * update).mT
    expected = expected + (more * (x @ layer.weight.mT) if has_more else 0)
    torch.testing.assert_close(product(x, a, b, more), expected)
    assert torch.autograd.gradcheck(product, (x, a, b, more))


@pytest.mark.parametrize("learning", ["a", "b"])
def test_the_gradient_of_one_factor_does_not_depend_on_whether_the_other_learns(learning: str) -> None:
    torch.manual_seed(0)
    layer, scale = _layer(False, True), torch.tensor([2.0, 3.0]).double().view(-1, 1, 1)
    x = torch.randn(LANES, N, IN).double()
    factors = {"a": torch.randn(LANES, RANK, IN).double(), "b": torch.randn(LANES, OUT, RANK).double()}
    gradients = []
    for learn in (("a", "b"), (learning,)):
        a, b = (tensor.clone().requires_grad_(name in learn) for name, tensor in factors.items())
        LowRankProduct.apply(x, a, b, None, (scale, None, None), layer).square().sum().backward()
        gradients.append({"a": a.grad, "b": b.grad})
    both, one = gradients
    assert both["a"] is not None
    assert both["b"] is not None
    assert torch.equal(one[learning], both[learning])
    assert one[{"a": "b", "b": "a"}[learning]] is None


@pytest.mark.parametrize("variant", ["lora", "pissa", "lora_fa"])
def test_only_the_input_the_hidden_values_and_computed_factors_are_kept(variant: str) -> None:
    """The lane's own tensors, such as LoRA's A, are not counted; s B is computed.

    PiSSA's factors have twice the rank. Where A does not learn (LoRA-FA), the input is not kept.
    """
    case = Case("low rank", out_features=40, in_features=24)
    adapters = attach_lanes(case, catalogue.get(variant), 1, VariantSettings(3, 6.0))
    layer = adapters.model.there[0]  # type: ignore[union-attr,index]
    x = lane_inputs(case, adapters.lanes).requires_grad_()
    kept: list[Tensor] = []
    resident = {
        t.untyped_storage().data_ptr()
        for t in [
            *adapters.model.parameters(),
            *adapters.trainable("0").values(),
            *adapters.frozen("0").values(),
        ]
    }

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS), hooks:
        layer(x)
    own = Counter(t.numel() for t in kept if t.untyped_storage().data_ptr() not in resident)
    factors = [6 * 24, 40 * 6] if variant == "pissa" else [40 * 3]
    inputs = [] if variant == "lora_fa" else [x.numel()]
    assert own == Counter([*factors, *inputs, 3 * x.numel() // 24])


def _gradients(product: Callable[..., Tensor], tensors: list[Tensor], lanes: slice) -> list[Tensor]:
    own = [tensor[lanes].clone().requires_grad_() for tensor in tensors]
    out = product(*own, lanes)
    noise = torch.randn(3, *out.shape[1:], generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, own, noise[lanes])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "rank"), [(8, 2), (40, 4), (192, 8), (192, 128)])
@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "vera"])
def test_a_lane_has_the_same_bits_alone_and_among_others(
    name: str, rows: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = FrozenLayer("layer", torch.randn(96, 64).to(dtype), None)
    x, more = torch.randn(3, rows, 64).to(dtype), torch.randn(3, 1, 96)
    a, b, d = torch.randn(3, rank, 64), torch.randn(3, 96, rank), torch.randn(3, rank)
    a0, b0, scale = torch.randn_like(a), torch.randn_like(b), torch.tensor([2.0, 3.0, 0.1]).view(-1, 1, 1)

    def low_rank(x: Tensor, a: Tensor, b: Tensor, lanes: slice) -> Tensor:
        frozen = (a0[lanes], b0[lanes]) if name == "pissa" else (None, None)
        return LowRankProduct.apply(x, a, b, None, (scale[lanes], *frozen), layer)

    def dora(x: Tensor, a: Tensor, b: Tensor, more: Tensor, lanes: slice) -> Tensor:
        return LowRankProduct.apply(x, a, b, more, (None, None, None), layer)

    def vera(x: Tensor, more: Tensor, d: Tensor, lanes: slice) -> Tensor:
        vectors = {"A": a[lanes], "B": b[lanes], "d": d, "b": more}
        base = torch.nn.functional.linear(x, layer.weight)
        variant = catalogue.get("vera")
        return variant.forward(x, base, variant.prepare(vectors, layer), layer)

    product, tensors = {"dora": (dora, [x, a, b, more]), "vera": (vera, [x, more[:, 0], d])}.get(
        name, (low_rank, [x, a, b])
    )
    together = _gradients(product, tensors, slice(None))
    for lane in range(3):
        alone = _gradients(product, tensors, slice(lane, lane + 1))
        for one, several in zip(alone, together, strict=True):
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


def test_a_second_derivative_is_refused() -> None:
    case = Case("low rank", out_features=40, in_features=24)
    for name in ("lora", "hira"):
        adapters = attach_lanes(case, catalogue.get(name), 1)
        x = lane_inputs(case, adapters.lanes).requires_grad_()
        with adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS):
            loss = model_output(adapters.model, x).square().sum()
        with pytest.raises(RuntimeError, match="a second derivative through an adapted layer"):
            torch.autograd.grad(loss, x, create_graph=True)


class Doubled(LoRA):
    """LoRA with a forward pass of its own, which doubles the update."""

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return base + 2 * (super().forward(x, base, params, layer) - base)


def test_a_subclass_with_its_own_forward_pass_is_not_bypassed() -> None:
    case = Case("low rank", out_features=40, in_features=24)
    outputs = []
    for variant in (LoRA(), Doubled()):
        adapters = attach_lanes(case, variant, 1)
        with torch.no_grad():
            for parameter in adapters.trainable("0").values():
                parameter.fill_(0.01)
        outputs.append(lane_outputs(case, adapters))
    assert not torch.equal(*outputs)


class CountCasts(TorchDispatchMode):
    """A mode that counts casts of tensors with a lane dimension."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].dim() == 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "salora", "vera"])
def test_factors_are_rounded_once_for_all_tokens_and_give_the_same_bits(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token that is generated calls every layer."""
    case = Case("tokens", dtype=torch.bfloat16)
    adapters = attach_lanes(case, catalogue.get(variant), LANES)
    perturb_lanes(case, adapters)
    inputs = lane_inputs(case, adapters.lanes)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "round_once", lambda self, prepared, layer: prepared)
        expected = lane_outputs(case, adapters)
    with adapters.activate_lanes(adapters.lanes, None), torch.no_grad():
        with CountCasts() as first:
            outputs = [model_output(adapters.model, inputs)]
        with CountCasts() as second:
            outputs.append(model_output(adapters.model, inputs))
    assert (first.count > 0, second.count) == (True, 0)
    assert all(torch.equal(output.view(expected.shape), expected) for output in outputs)
