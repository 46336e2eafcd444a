"""Operators that a GPU runs as one kernel, so that `tensor_counts` counts them as one.

`flash_attention` replaces PyTorch's attention, which the meta device would split into products and a softmax.
`fuse_model` also replaces RMSNorm, rotary embedding and SwiGLU as Liger's kernels do. The operators have the
shapes and saved tensors of the real ones, and no values: they run on the meta device only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

_LIBRARY = torch.library.Library("lora_benchmarks", "DEF")


def _define(signature: str, results: int) -> Any:
    """Define an operator whose results have the shapes of its first tensor arguments.

    Args:
        signature: Its name and arguments.
        results: The number of results.
    """
    name = signature.partition("(")[0]
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _LIBRARY.define(f"{signature} -> {returns}")

    def on_meta(*args: Tensor) -> Any:
        shaped = tuple(torch.empty_like(tensor) for tensor in args[:results])
        return shaped[0] if results == 1 else shaped

    _LIBRARY.impl(name, on_meta, "Meta")
    return getattr(torch.ops.lora_benchmarks, name).default


_attention = _define("flash_attention(Tensor q, Tensor k, Tensor v)", 1)
_attention_backward = _define("flash_attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor g)", 3)
_rms_norm = _define("rms_norm(Tensor x, Tensor weight)", 1)
_rms_norm_backward = _define("rms_norm_backward(Tensor x, Tensor weight, Tensor g)", 1)
_rotary = _define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin)", 2)
_silu_product = _define("silu_product(Tensor gate, Tensor up)", 1)
_silu_product_backward = _define("silu_product_backward(Tensor gate, Tensor up, Tensor g)", 2)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _attention(q, k, v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _attention_backward(*ctx.saved_tensors, gradient)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _rms_norm(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _rms_norm_backward(*ctx.saved_tensors, gradient), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return _rotary(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, q_gradient: Tensor, k_gradient: Tensor) -> Any:
        return *_rotary(q_gradient, k_gradient, *ctx.saved_tensors), None, None


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_product(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _silu_product_backward(*ctx.saved_tensors, gradient)


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return the output of attention in the shape of the query, as scaled_dot_product_attention does."""
    return _FlashAttention.apply(query, key, value)  # type: ignore[no-untyped-call]


def _apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
    return _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Count attention as one kernel inside the context."""
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", _attend):
        yield


@contextmanager
def fuse_model(model: nn.Module) -> Iterator[None]:
    """Count attention, RMSNorm, rotary embedding and SwiGLU as one kernel each inside the context.

    Args:
        model: A model of the Llama or Qwen3 family.
    """
    with ExitStack() as stack:
        stack.enter_context(flash_attention())
        stack.enter_context(
            patch.object(sys.modules[type(model).__module__], "apply_rotary_pos_emb", _apply_rotary)
        )
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(patch.object(module, "forward", _norm_forward(module)))
            elif type(module).__name__.endswith("MLP"):
                stack.enter_context(patch.object(module, "forward", _mlp_forward(module)))
        yield


def _norm_forward(module: Any) -> Any:
    return lambda x: _RmsNorm.apply(x, module.weight)  # type: ignore[no-untyped-call]


def _mlp_forward(module: Any) -> Any:
    return lambda x: module.down_proj(_SiluProduct.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
