"""The sizes of a decoder-only language model, from which time and memory of its steps are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import loading
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch.known_models import KNOWN_MODELS
from orchestrator.study.configuration import ModelChoice

COUNTED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""The architectures of transformers that a prediction covers. Steps of `llama` and `qwen3` were counted; the
others have llama's layers, qwen2 with biases in three of them."""


class PredictionError(Exception):
    """The reason why nothing is predicted for a study, as a clause of a sentence."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only language model with gated MLPs, such as Llama or Qwen3."""

    hidden: int
    intermediate: int
    layers: int
    queries: int
    """Outputs of the projection of queries."""
    keys: int
    """Outputs of the projection of keys, and of that of values."""
    vocab: int
    norms_queries: bool = False
    """True if queries and keys pass through RMSNorm."""

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Return the sizes in a transformers configuration.

        Raises:
            PredictionError: The configuration is that of another architecture.
        """
        config = config.get_text_config()
        if config.model_type not in COUNTED_MODEL_TYPES:
            raise PredictionError(f"steps of models of type {config.model_type} have not been counted")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            head_dim * heads,
            head_dim * config.num_key_value_heads,
            config.vocab_size,
            norms_queries=config.model_type == "qwen3",
        )

    @property
    def layer_weights(self) -> int:
        """Number of values in the weights of all linear layers of a block."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def layer_outputs(self) -> int:
        """Sum of the output sizes of all linear layers of a block."""
        return self.queries + 2 * self.keys + 2 * self.intermediate + 2 * self.hidden

    @property
    def layer_inputs(self) -> int:
        """Sum of the input sizes of all linear layers of a block."""
        return 5 * self.hidden + self.queries + self.intermediate


def find_shape(model: ModelChoice, bases: Path) -> ModelShape:
    """Return the shape of a model in bfloat16.

    Args:
        model: The model.
        bases: The store's folder of base models.

    Raises:
        PredictionError: The model has another data type or architecture, or its sizes are not known.
    """
    if model.dtype != "bfloat16":
        raise PredictionError(f"{model.name} is in {model.dtype}, and only steps in bfloat16 were counted")
    if model.content != UNPREPARED or loading.unprepared_config(model) is not None:
        return ModelShape.from_config(loading.read_config(model, bases))
    from transformers import AutoConfig

    if model.name not in KNOWN_MODELS:
        raise PredictionError(f"the sizes of {model.name} are unknown until it is here")
    return ModelShape.from_config(AutoConfig.for_model(**KNOWN_MODELS[model.name]))
