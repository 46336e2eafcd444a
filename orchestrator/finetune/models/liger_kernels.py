"""Liger's Triton kernels for norms, rotary embeddings and gated activations, in place of transformers' code.

The linear layers stay modules, so adapters work as before. Results differ by rounding: a record names the
kernels in its provenance.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from orchestrator.util.errors import UsageError
from orchestrator.util.extras import require_package

FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "smollm3",
)  # fmt: skip
"""The `model_type` of the decoders to which Liger's kernels are applied."""
KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
"""Liger's kernels that are used, as far as Liger has them for a model."""
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger's losses. They stay off: they would replace the model's `forward`; lanes have their own losses."""
REMEDY = "take --kernels torch"
"""What to do where Liger cannot be used."""


def check_liger(family: str, name: str) -> None:
    """Check that Liger is installed and knows a model, without importing it (this needs no GPU).

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


def apply_liger(model: Any, name: str) -> str:
    """Replace the norms, the rotary embedding and the gated activation of a model by Liger's kernels.

    Args:
        model: A transformers model on a GPU, without adapters.
        name: The model's name, for errors.

    Returns:
        The name of the kernels in the provenance of a record: "liger" and its version.

    Raises:
        UsageError: The model is not on a GPU, Liger is missing, or it has no kernels for the model.
    """
    if model.device.type == "cpu":
        raise UsageError(f"--kernels liger: model {name!r} is on a CPU, and Liger needs a GPU; {REMEDY}.")
    check_liger(model.config.model_type, name)
    replace_modules(model)
    return f"liger {version('liger-kernel')}"


def replace_modules(model: Any) -> None:
    """Let Liger replace the forward methods of a model's modules.

    Liger replaces names in transformers' modules as well, so models that the process loads later have the
    kernels too. A trainer has one choice of kernels for all its models.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, **KERNELS, **LOSSES)
