"""Frozen layers of 4 bits: the format, the layer, and lanes over such layers. tests/contract has the laws."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from kinds import others_slow
from scipy.stats import norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variants import catalogue
from variants.api import AdaptationScope, UnsupportedError, VariantSettings
from variants.nf4 import BLOCK_SIZE, VALUES, NF4Linear, NF4Weight, quantize_blocks
from variants.testing import Case
from variants.testing.rig import attach_lanes, calibrate_lane, lane_inputs, model_output, perturb_lanes

LLAMA = Case("nf4-llama", model="llama", nf4=True)
ADAPTERS = [name for name in catalogue.names() if name not in ("full", "head_only")]


def random_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.Generator().manual_seed(out_features)
    return (0.02 * torch.randn(out_features, in_features, generator=noise)).to(dtype)


def test_the_values_are_the_quantiles_of_qlora() -> None:
    """Appendix E: 8 quantiles of the positive half, 7 of the negative half and 0, scaled to [-1, 1]."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.tensor(sorted([*positive, 0.0, *negative]))
    torch.testing.assert_close(torch.tensor(VALUES), (values / values.max()).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 64), (24, 40), (7, 5)])
def test_each_weight_is_rounded_to_the_nearest_value_of_its_block(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    found = NF4Weight.quantize(weight).dequantize()
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = flat.abs().amax(1, keepdim=True)
    candidates = (scales.unsqueeze(2) * torch.tensor(VALUES)).expand(-1, BLOCK_SIZE, -1)
    nearest = (candidates - flat.unsqueeze(2)).abs().argmin(2, keepdim=True)
    expected = candidates.gather(2, nearest).flatten()[: weight.numel()].view(shape)
    assert torch.equal(found, expected)
    assert torch.equal(found.abs().max(), weight.abs().max()), "the largest value of a block is exact"


def test_the_error_on_normal_weights_is_that_of_nf4() -> None:
    """No error exceeds half of the widest gap of its block.

    The mean square of the errors is below 1 % of the mean square of the weights.
    """
    weight = random_weight(512, 256)
    error = (NF4Weight.quantize(weight).dequantize() - weight).view(-1, BLOCK_SIZE)
    scales = weight.view(-1, BLOCK_SIZE).abs().amax(1, keepdim=True)
    widest = max(right - left for left, right in pairwise(VALUES))
    assert (error.abs() <= scales * widest / 2 * (1 + 1e-6)).all()
    assert error.square().mean() < 0.01 * weight.square().mean()


def test_a_block_of_zeros_stays_zero() -> None:
    weight = random_weight(2, 64)
    weight[1] = 0
    assert not NF4Weight.quantize(weight).dequantize()[1].any()


def test_a_weight_of_16_bits_takes_4_and_a_half() -> None:
    quantized = NF4Weight.quantize(random_weight(64, 128, torch.bfloat16))
    assert 8 * (quantized.packed.nbytes + quantized.scales.nbytes) == 4.5 * 64 * 128
    assert quantized.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_stores_the_same_bytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = random_weight(96, 128, dtype)
    ours = NF4Weight.quantize(weight)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))
    assert tuple(state.code.tolist()) == VALUES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_what_a_linear_layer_over_the_dequantized_weight_does(
    dtype: torch.dtype, bias: bool
) -> None:
    plain = nn.Linear(64, 40, bias=bias, dtype=dtype).requires_grad_(False)
    layer = NF4Linear(plain)
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    inputs = [random_weight(96, 64, dtype).view(16, 6, 64).requires_grad_() for _ in range(2)]
    with LiveBytes() as memory:
        found = layer(inputs[0])
    assert memory.live == found.nbytes, "the dequantized weight is kept for the backward pass"
    expected = plain(inputs[1])
    assert torch.equal(found, expected)
    assert torch.equal(layer(inputs[0][8:]), found[8:]), "a row depends on the rows beside it"
    for output in (found, expected):
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", others_slow(ADAPTERS))
def test_lanes_get_the_gradients_that_they_get_over_the_dequantized_model(name: str) -> None:
    """This includes the variants that read the weight itself: DoRA, HiRA, PiSSA."""
    found: list[dict[str, Tensor]] = []
    for model in (LLAMA.build(), LLAMA.build_for_peft()):
        adapters = attach_lanes(LLAMA, catalogue.get(name), 2, model=model)
        perturb_lanes(LLAMA, adapters)
        x = lane_inputs(LLAMA, adapters.lanes)
        with adapters.activate_lanes(adapters.lanes, 0):
            LLAMA.loss(model_output(adapters.model, x), x).backward()
        lanes = adapters.lanes
        found.append({f"{a} {n}": p.grad for a in lanes for n, p in adapters.trainable(a).items()})  # type: ignore[misc]
    quantized, plain = found
    assert quantized.keys() == plain.keys()
    assert all(torch.equal(quantized[key], plain[key]) for key in plain)
    assert any(gradient.any() for gradient in plain.values())


@pytest.mark.parametrize("name", others_slow(ADAPTERS))
def test_no_variant_keeps_a_dequantized_weight_for_the_backward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = attach_lanes(LLAMA, catalogue.get(name), 2)
    perturb_lanes(LLAMA, adapters)
    weights = {layer.frozen_layer.shape for layer in adapters.layers.values()}
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    dequantized: list[weakref.ref[torch.UntypedStorage]] = []
    dequantize = NF4Weight.dequantize

    def record(weight: NF4Weight) -> Tensor:
        result = dequantize(weight)
        dequantized.append(weakref.ref(result.untyped_storage()))
        return result

    monkeypatch.setattr(NF4Weight, "dequantize", record)
    x = lane_inputs(LLAMA, adapters.lanes)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with adapters.activate_lanes(adapters.lanes, 0), hooks:
        output = model_output(adapters.model, x)
    assert output.requires_grad
    assert saved
    assert dequantized
    assert not any(storage() is not None for storage in dequantized)
    assert not weights & set(saved)
    assert not {(columns, rows) for rows, columns in weights} & set(saved)


def test_only_the_layers_of_the_blocks_are_quantized() -> None:
    model = LLAMA.build()
    quantized = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(quantized) == 14
    assert all(name.startswith("model.layers.") for name in quantized)
    assert type(model.lm_head) is nn.Linear
    attention = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    assert quantize_blocks(attention) == 0, "it reads the weight of its out_proj without calling the layer"


def test_full_fine_tuning_is_refused() -> None:
    variant = catalogue.get("full")
    assert variant.adaptation_scope is AdaptationScope.FULL_MODEL
    with pytest.raises(
        UnsupportedError, match=r"full trains every weight, and model\.layers\.0\.\S+ has 4 bits"
    ):
        attach_lanes(LLAMA, variant, 1, VariantSettings(0, None))


class LiveBytes(TorchDispatchMode):
    """A mode that counts the bytes of the storages that operations have made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before | self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_layers_are_quantized_one_by_one() -> None:
    """At the peak there are the quantized model and the working memory of one layer, not a second model."""
    count, side = 32, 128
    model = nn.ModuleList(nn.Linear(side, side, bias=False, dtype=torch.bfloat16) for _ in range(count))
    weights = [weakref.ref(layer.weight) for layer in model]
    size_16_bit = 2 * side * side
    with LiveBytes() as memory:
        quantize_blocks(model)
    assert not any(weight() is not None for weight in weights), "the 16-bit weights are kept"
    quantized = count * size_16_bit * 4.5 / 16
    assert memory.live <= quantized * 1.1
    assert memory.peak <= quantized + 8 * size_16_bit


def test_calibration_reads_gradients_and_inputs_of_quantized_layers() -> None:
    for name in ("lora_ga", "eva"):
        adapters = attach_lanes(LLAMA, catalogue.get(name), 0)
        tensors = calibrate_lane(LLAMA, adapters, 0)
        assert tensors.keys() == adapters.layers.keys()
        assert all(tensor.isfinite().all() for each in tensors.values() for tensor in each.values())
