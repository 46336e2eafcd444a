"""Counts of PyTorch's kernel launches, bytes and operations, and the peak of live tensors.

The counts come from the operators that are dispatched below autograd, so they include the backward pass and
are exact for eager PyTorch, also on the meta device, where nothing is computed. Memory that an operator
allocates inside its kernel is not counted.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMM_FLOPS = {torch.bfloat16: 620e12, torch.float16: 620e12, torch.float32: 50e12, torch.float64: 50e12}
"""Operations per second of matrix products on an H100, by data type; float32 without TF32."""
MEMORY_BYTES = 2.6e12
"""Bytes per second that an H100 reads and writes."""
LAUNCH_SECONDS = 2.5e-6
"""The shortest time of a kernel on the device."""

NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "_unsafe_view", "lift_fresh", "set_", "_reshape_alias", "resize_", "record_stream",
}  # fmt: skip
"""Operators that launch no kernel."""
READ_ROWS = {"embedding", "index_select", "gather", "index"}
"""Operators that read only as many bytes of their first argument as they write."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "baddbmm_"}
MULTI_TENSOR = {"_foreach_": 64, "_fused_adamw": 36}
"""Prefix of an operator on lists of tensors -> tensors that one kernel takes."""
MORE_LAUNCHES = {"baddbmm": 1, "flash_attention_backward": 2}
"""Further kernels of an operator: baddbmm copies its first argument; flash attention has three kernels in the
backward pass."""


@dataclass
class Counts:
    """What a `TensorCounter` has counted within its context."""

    launches: int = 0
    transfers: int = 0
    """Copies from another device, such as the CPU."""
    host_waits: int = 0
    """Reads of a tensor's value by Python, for which the host waits."""
    bytes: float = 0.0
    """Bytes read and written by kernels."""
    gemm_flops: float = 0.0
    seconds: float = 0.0
    """The sum over kernels of the longest of three times: that of the operations, of the bytes, and of a
    launch. An H100 is assumed."""
    by_operator: Counter[str] = field(default_factory=Counter)
    """Operator -> launches."""
    seconds_by_operator: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    """The largest sum of the bytes of all live tensors."""
    peak_by_operator: dict[str, int] = field(default_factory=dict)
    """Operator -> bytes of its live results at the peak; "" stands for tensors that existed before."""


class TensorCounter(TorchDispatchMode):
    """A context that counts what the operators inside it do on one device.

    On the meta device, where a tensor has no value to read, a read gives 1 or True.

    Args:
        device_type: The type of the device whose operators and tensors are counted.
        resident: Tensors that exist before the context and count as live memory, such as weights.
    """

    def __init__(self, device_type: str, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device_type, self.counts = device_type, Counts()
        self._live: dict[int, tuple[str, int]] = {}
        self._live_bytes = 0
        self._live_by_operator: Counter[str] = Counter()
        for tensor in resident:
            self._register(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == self.device_type:
            self.counts.host_waits += 1
            if self.device_type == "meta":
                return True if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._register(tensor, func._schema.name.partition("::")[2])
        self._count(func, [*tree_leaves(args), *tree_leaves(kwargs or {})], outputs)
        return result

    @property
    def live_bytes(self) -> int:
        """The bytes of all tensors that are alive now."""
        return self._live_bytes

    def _register(self, tensor: Tensor, operator: str = "") -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = operator, storage.nbytes()
        self._live_bytes += storage.nbytes()
        self._live_by_operator[operator] += storage.nbytes()
        if self._live_bytes > self.counts.peak_bytes:
            self.counts.peak_bytes = self._live_bytes
            self.counts.peak_by_operator = dict(self._live_by_operator)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        operator, size = self._live.pop(key)
        self._live_bytes -= size
        self._live_by_operator[operator] -= size

    def _count(self, func: Any, leaves: list[Any], outputs: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in NO_KERNEL or func.is_view or not outputs or outputs[0].device.type != self.device_type:
            return
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.device.type != self.device_type for tensor in inputs) and "copy" in name:
            self.counts.transfers += 1
            return
        launches = 1 + MORE_LAUNCHES.get(name, 0)
        for prefix, tensors in MULTI_TENSOR.items():
            if name.startswith(prefix):
                launches = math.ceil(len(inputs) / tensors)
        counted = outputs * 2 if name in READ_ROWS else [*inputs, *outputs]
        size = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in counted)
        flops = _product_flops(name, inputs, outputs[0])
        rate = GEMM_FLOPS.get(outputs[0].dtype, GEMM_FLOPS[torch.float32])
        seconds = max(flops / rate, size / MEMORY_BYTES, launches * LAUNCH_SECONDS)
        counts = self.counts
        counts.launches += launches
        counts.bytes += size
        counts.gemm_flops += flops
        counts.seconds += seconds
        counts.by_operator[name] += launches
        counts.seconds_by_operator[name] += seconds  # type: ignore[assignment]  # a Counter may hold floats


def _product_flops(name: str, inputs: list[Tensor], output: Tensor) -> float:
    """Return the floating-point operations of a matrix product or of attention; 0 for other operators."""
    if name in PRODUCTS:
        return 2.0 * output.numel() * inputs[-2 if name in ("mm", "bmm") else 1].shape[-1]
    if name.startswith("flash_attention"):
        query, key = inputs[0], inputs[1]
        causal = 2.0 * query.numel() * key.shape[-2]  # two products over half of the positions
        return causal * (2.5 if name.endswith("backward") else 1.0)
    return 0.0
