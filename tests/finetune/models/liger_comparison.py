"""Compare losses and gradients with and without Liger's kernels; test_liger_kernels.py runs this script.

Liger changes transformers' modules for a whole process, so the plain model is computed first. Without a GPU,
Triton's interpreter runs the same kernels on the CPU. Two of its limits (Triton 3.9) need a replacement: it
does not turn floats into tensors, and it lacks libdevice's `rsqrt`.

    python liger_comparison.py DEVICE MODEL VARIANT ...
    python liger_comparison.py DEVICE loss DTYPE ...

It prints one JSON object per variant: the losses, and the largest relative error of a gradient. With "loss"
it compares the cross-entropies of an output layer in these dtypes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

from orchestrator.finetune.evaluation import forward
from orchestrator.finetune.models import changes
from variants import catalogue
from variants.adapters import attach
from variants.api import VariantSettings

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MODELS = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "mistral": "Mistral"}
SETTINGS = VariantSettings(4, 8.0)


def build(kind: str, device: str) -> Any:
    torch.manual_seed(0)
    name = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for module in model.modules():  # a weight of ones would hide an error of its scale
        if "RMSNorm" in type(module).__name__:
            nn.init.normal_(module.weight, 1.0, 0.1)
    return model.to(device)


def compute(model: Any, variant: str) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of two lanes."""
    adapters = attach(model, catalogue.get(variant), SETTINGS)
    for lane in ("a", "b"):
        adapters.add_lane(lane, SETTINGS, seed=ord(lane))
        for number, parameter in enumerate(adapters.trainable(lane).values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.add_(0.1 * noise.to(parameter))
    ids = torch.randint(1, 64, (4, 7), generator=torch.Generator().manual_seed(1)).to(model.device)
    with adapters.activate_lanes(("a", "b"), 0, rows_per_lane=2):
        logits = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    parameters = [(f"{a} {name}", p) for a in adapters.lanes for name, p in adapters.trainable(a).items()]
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    adapters.detach()
    return loss.item(), gradients


def compare_losses(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Compare losses, objective and gradient of lanes of different sizes."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 300, dtype=dtype, device=device).requires_grad_(False)
    hidden = torch.randn(30, 16, dtype=dtype).mul_(4).to(device).requires_grad_(True)
    labels, weights = torch.randint(300, (30,)).to(device), torch.rand(30, dtype=torch.float64).to(device)
    found = []
    for uses_liger in (False, True):
        with patch.object(forward, "CHUNK_TARGETS", 7):
            objective, losses = forward.compute_token_objective(
                hidden, layer, labels, weights, (20, 10), uses_liger
            )
        (3 * objective).backward()
        found.append((objective.item(), losses, hidden.grad))
        hidden.grad = None
    (plain, *expected), (liger, *others) = found
    errors = [((b - a).norm() / a.norm()).item() for a, b in zip(expected, others, strict=True)]
    return {"variant": str(dtype), "losses": [plain, liger], "error": max(errors)}


def complete_interpreter() -> None:
    """Let Triton's interpreter turn floats into tensors, and replace `rsqrt` in Liger's RMSNorm."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_float(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert_float
    from liger_kernel.ops import rms_norm

    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # the interpreter replaces tl.rsqrt while a kernel runs


def main(device: str, kind: str, *variants: str) -> None:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        complete_interpreter()
    if kind == "loss":
        for name in variants:
            print(json.dumps(compare_losses(getattr(torch, name), device)))
        return
    model = build(kind, device)
    plain = {variant: compute(model, variant) for variant in variants}
    changes.replace_modules(model)
    assert re.search(
        r"LigerRMSNorm.*Liger(SwiGLU|GEGLU)MLP|Liger\w+MLP.*LigerRMSNorm", repr(model), re.DOTALL
    )
    for variant in variants:
        (loss, expected), (liger_loss, found) = plain[variant], compute(model, variant)
        assert expected.keys() == found.keys()
        errors = [((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected]
        print(json.dumps({"variant": variant, "losses": [loss, liger_loss], "error": max(errors)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
