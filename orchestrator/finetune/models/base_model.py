"""A frozen base model that carries the adapters of lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.models import output_layer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseModel:
    """A base model in eval mode and without gradients, in the dtype of its `ModelChoice`."""

    model: Any
    """The transformers model."""
    processor: Any
    """Makes the model's inputs: a tokenizer with a padding token, or an `ImageProcessor`. A tokenizer for
    answers has an end token as well."""
    device: torch.device
    """The device of the model."""
    head_names: tuple[str, ...] = ()
    """The modules of the task's head. Here their linear layers are zero; every lane has its own copy."""
    kernels: str = "torch"
    """The code of norms, rotary embeddings and activations: "torch", or "liger" and its version."""
    memory_fraction: float = 1.0
    """The part of the GPU's memory that the trainer may use when trainers share a GPU: 0.5 is half of it."""

    @property
    def tokenizer(self) -> Any:
        """The processor of a model that reads text."""
        return self.processor

    @cached_property
    def is_causal(self) -> bool:
        """Whether a token attends only to the tokens before it."""
        return is_causal(self.model)

    @cached_property
    def has_token_types(self) -> bool:
        """Whether token types 0 and 1 have embeddings (RoBERTa has only 0, DeBERTa-v3 neither)."""
        return (getattr(self.model.config, "type_vocab_size", None) or 0) > 1

    @cached_property
    def has_sliding_window(self) -> bool:
        """Whether a token attends only to its neighbors in some layers."""
        return any("sliding" in kind for kind in getattr(self.model.config, "layer_types", None) or ())

    @cached_property
    def has_convolution(self) -> bool:
        """Whether the model is a DeBERTa-v2 with a convolution (xlarge), which also reads padding."""
        config = self.model.config
        return config.model_type == "deberta-v2" and getattr(config, "conv_kernel_size", 0) > 0

    @cached_property
    def ends_with_output_layer(self) -> bool:
        """Whether a language model's logits are the result of its output layer alone.

        It is first read when the model is loaded, before layers are adapted.
        """
        return output_layer.ends_with_output_layer(self.model)


def is_causal(model: Any) -> bool:
    """Return whether a transformers model has an attention module that is causal."""
    return not is_bidirectional(model) and any(
        getattr(module, "is_causal", False) for module in model.modules()
    )


def is_bidirectional(model: Any) -> bool:
    """Return whether the configuration makes a decoder bidirectional, as LLM2Vec does.

    transformers then leaves the causal mask out, although the attention modules still say `is_causal`.
    """
    return not getattr(model.config.get_text_config(), "is_causal", True)
