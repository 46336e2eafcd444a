"""Options that change how the blocks of a loaded model compute: --kernels and --gradient-checkpointing.

Liger's Triton kernels compute norms, rotary embeddings and gated activations. The linear layers stay modules,
so adapters work as before. Results differ by rounding: a record names the kernels in its provenance.

With activation checkpointing, blocks are computed again in the backward pass. Training takes about a third
longer and needs the activations of one block instead of all. Numbers stay the same. transformers' own
gradient checkpointing is not used: it needs training mode, which would turn on the dropout of the frozen base
model, and it makes the output of the embeddings require gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.util.errors import UsageError, require_package

FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "smollm3",
)  # fmt: skip
"""The `model_type` of the decoders to which Liger's kernels are applied."""
KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
"""Liger's kernels that are used, as far as Liger has them for a model."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger's losses. They are off, because they would replace the model's `forward`. Lanes have losses of their
own, which launch the kernel of Liger's cross-entropy (`evaluation/forward.py`)."""
REMEDY = "take --kernels torch"
"""What to do where Liger cannot be used."""
COMPILER_REMEDY = f"install gcc and python3-dev (Python.h) on every node, or {REMEDY}"
CHECKPOINTING_ATTRIBUTE = "has_activation_checkpointing"
"""An attribute that is set on a model with activation checkpointing."""


def check_liger(family: str, name: str) -> None:
    """Check that Liger and Triton are installed and that Liger supports a model.

    Liger is not imported, and no GPU is needed.

    Args:
        family: The `model_type` in the model's config.json.
        name: The model's name, for the error.

    Raises:
        UsageError: Liger or Triton is missing, or Liger has no kernels for the model.
    """
    if family not in FAMILIES:
        raise UsageError(
            f"--kernels liger: model {name!r} is of type {family!r}, and the kernels are for "
            f"{', '.join(FAMILIES)}; {REMEDY}."
        )
    require_package("--kernels liger", "liger_kernel", "gpu", f"or {REMEDY}")
    if find_spec("triton") is None:
        raise UsageError(
            f"--kernels liger needs triton, which is not installed: install torch for CUDA, or {REMEDY}."
        )


def launch_kernel(device: Any) -> None:
    """Launch one of Liger's kernels on a device.

    Raises:
        UsageError: It cannot be compiled or launched. Its `fault` is `Fault.DEVICE`, because the cause is the
            machine and not a lane.
    """
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    ones = torch.ones(1, 8, device=device)
    try:
        LigerSiLUMulFunction.apply(ones, ones)
    except Exception as error:  # the compiler, Triton and the driver raise various types
        if classify_error(error) is Fault.MEMORY:
            raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        refusal = UsageError(f"--kernels liger: no kernel can be launched ({reason}): {COMPILER_REMEDY}.")
        refusal.fault = Fault.DEVICE  # type: ignore[attr-defined]  # `classify_error` reads it
        raise refusal from error


def apply_liger(model: Any, name: str) -> str:
    """Replace the norms, the rotary embedding and the gated activation of a model by Liger's kernels.

    Args:
        model: A transformers model on a GPU, without adapters.
        name: The model's name, for errors.

    Returns:
        The name of the kernels in the provenance of a record: "liger" and its version.

    Raises:
        UsageError: The model is not on a GPU, Liger is missing or has no kernels for it, or none compiles.
    """
    if model.device.type == "cpu":
        raise UsageError(f"--kernels liger: model {name!r} is on a CPU, and Liger needs a GPU; {REMEDY}.")
    check_liger(model.config.model_type, name)
    launch_kernel(model.device)
    replace_modules(model)
    return f"liger {version('liger-kernel')}"


def replace_modules(model: Any) -> None:
    """Let Liger replace the forward methods of a model's modules.

    Liger replaces names in transformers' modules as well, so models that the process loads later have the
    kernels too. A trainer has one choice of kernels for all its models.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, **KERNELS, **LOSSES)


def enable_activation_checkpointing(model: Any) -> None:
    """Make the blocks of a transformers model compute their activations again in the backward pass.

    Blocks are the modules that transformers itself can checkpoint. The change cannot be undone.

    Raises:
        UsageError: The model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"--gradient-checkpointing: {type(model).__name__} has no blocks that transformers can compute "
            "again; leave the option out."
        )
    for block in blocks:
        block.forward = _checkpoint_forward(block)
    setattr(model, CHECKPOINTING_ATTRIBUTE, True)


def _checkpoint_forward(block: Any) -> Any:
    """Return a forward method that keeps no activations and draws equal dropout masks each time."""
    forward = block.forward

    def context_fn() -> Any:
        state = next((m.adapter_state for m in block.modules() if hasattr(m, "adapter_state")), None)
        return (nullcontext(), nullcontext()) if state is None else state.checkpoint_contexts()

    @wraps(forward)
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation, generation
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    return checkpointed_forward
