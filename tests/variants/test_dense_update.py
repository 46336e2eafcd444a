"""The layer of a dense update: gradients, number of products of full size, and kept memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings
from variants.testing.rig import ROWS, Case, attach_lanes, lane_inputs, perturb_lanes

IN, OUT, RANK, LANES = 24, 40, 3, 2


class CountFullProducts(TorchDispatchMode):
    """A mode that counts matrix products with a factor or result of shape (OUT, IN).

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
            self.count += lanes * ({IN, OUT} <= sizes and RANK not in sizes)
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
    case = Case("dense", out_features=OUT, in_features=IN, dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("hira"), LANES, VariantSettings(RANK, None))
    layer = adapters.model.there[0]  # type: ignore[union-attr,index]
    x = lane_inputs(case, adapters.lanes).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with CountFullProducts() as counter, adapters.activate_lanes(adapters.lanes, 0, rows_per_lane=ROWS):
        with hooks:
            out = layer(x)
        out.sum().backward()
    base_products = 2 if products == 5 else 0  # the base's products are over the rows of all lanes
    assert counter.count == LANES * 3 + base_products
    weight = layer.base_layer.weight
    own = Counter(t.numel() for t in kept if t.untyped_storage().data_ptr() != weight.data_ptr())
    assert own == {x.numel(): 1, LANES * RANK * IN: 1, LANES * RANK * OUT: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_input_of_the_update_alone(dtype: torch.dtype) -> None:
    case = Case("dense", dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("hira"), 1, VariantSettings(4, None, dropout=0.5))
    perturb_lanes(case, adapters)
    layer, x = adapters.layers["there.0"], case.rows(0)
    with torch.no_grad(), adapters.activate_lanes(["0"], 0) as context:
        out = layer(x)
        context.mask_draws.clear()
    from variants.forward_context import draw_dropout_masks

    with torch.no_grad():
        mask = draw_dropout_masks(x.view(1, -1, 32), 0.5, "there.0", context, adapters.state.seeds)
        a, b = (adapters.trainable("0")[f"there.0.{name}"] for name in "AB")
        weight = layer.frozen_layer.weight.double()
        update = (x.view(1, -1, 32) * mask).double() @ (weight * (b.double() @ a.double())).T
        expected = x.double() @ weight.T + update.view(x.shape)
    assert (out.double() - expected).norm() < case.tolerance * expected.norm()
