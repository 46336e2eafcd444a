"""Random models of known sizes, on which the benchmarks measure without downloading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.launch.known_models import KNOWN_MODELS, config_sizes


@dataclass(frozen=True)
class ModelShape:
    """An architecture of transformers and its sizes."""

    family: str
    """The prefix of the classes in transformers: <family>Config and <family>ForCausalLM."""
    sizes: Mapping[str, Any]
    """Arguments of the configuration class."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return int(self.sizes["vocab_size"])


def _shape(sizes: Mapping[str, Any]) -> ModelShape:
    """Return the shape for sizes as in `orchestrator/launch/known_models.py`."""
    family = {"llama": "Llama", "qwen3": "Qwen3"}[sizes["model_type"]]
    return ModelShape(family, {key: value for key, value in sizes.items() if key != "model_type"})


SHAPES = {
    "tiny": _shape(config_sizes("qwen3", True, "512 32 64 2 2 1", head_dim=16)),
    "letters": _shape(config_sizes("llama", False, "25 96 192 3 4 4")),
    "smollm2-135m": _shape(KNOWN_MODELS["HuggingFaceTB/SmolLM2-135M"]),
    "qwen3-0.6b": _shape(KNOWN_MODELS["Qwen/Qwen3-0.6B-Base"]),
    "llama-3.1-8b": _shape(KNOWN_MODELS["meta-llama/Llama-3.1-8B"]),
}
"""Name -> shape. `letters` is the base model of the task of that name."""


def build_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: int | None = None,
    **sizes: int,
) -> Any:
    """Return a frozen language model with random weights, in eval mode.

    Args:
        name: A key of `SHAPES`.
        device: The device; `meta` makes a model without values.
        dtype: The data type of the weights.
        layers: The number of decoder blocks; None for that of the shape.
        **sizes: Further arguments of the configuration class, in place of the shape's.
    """
    import transformers

    shape = SHAPES[name]
    sizes = {**shape.sizes, **sizes}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = getattr(transformers, f"{shape.family}Config")(**sizes)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{shape.family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
