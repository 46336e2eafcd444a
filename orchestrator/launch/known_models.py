"""Sizes of models of the Hugging Face hub that are planned or counted before they are downloaded.

`experiments/benchmarks/model_shapes.py` uses this module too, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config_sizes(model_type: str, tied: bool, numbers: str, **more: int) -> dict[str, Any]:
    """Return the arguments of a configuration class, and the model type.

    Args:
        model_type: The name of the architecture in transformers.
        tied: Whether the output layer shares the weights of the embedding.
        numbers: The sizes in the order of `names`, separated by spaces.
        **more: Further arguments.
    """
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    values = dict(zip(names, map(int, numbers.split()), strict=True))
    return {"model_type": model_type, "tie_word_embeddings": tied, **values, **more}


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": config_sizes("llama", True, "49152 576 1536 30 9 3"),
    "Qwen/Qwen3-0.6B-Base": config_sizes("qwen3", True, "151936 1024 3072 28 16 8", head_dim=128),
    "Qwen/Qwen3-1.7B-Base": config_sizes("qwen3", True, "151936 2048 6144 28 16 8", head_dim=128),
    "meta-llama/Llama-3.1-8B": config_sizes("llama", False, "128256 4096 14336 32 32 8"),
}
"""Hub name -> the model type and the arguments of its configuration class in transformers."""
