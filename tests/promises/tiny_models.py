"""Base models of two blocks and a few thousand random weights, saved to folders as a user's models are.

The weights are equal at each call.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("<pad>", "<eos>", "<unk>", *string.ascii_lowercase, *string.digits, "=", "copy", "ham", "spam")


def tokenizer(words: Sequence[str] = WORDS) -> Any:
    """Return a tokenizer with one token for each word. Without "<unk>", an unknown word becomes "<pad>"."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk") if f"<{name}>" in words}
    unknown = special.get("unk_token", "<pad>")
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def llama(folder: Path, words: Sequence[str] = WORDS, width: int = 32) -> Path:
    """Save a Llama with a tokenizer of `words`, and return the folder."""
    from transformers import LlamaForCausalLM

    return _save(folder, LlamaForCausalLM, words, width, bos_token_id=None, eos_token_id=1)


def bert(folder: Path, width: int = 32) -> Path:
    """Save a BERT with a tokenizer of `WORDS`, and return the folder."""
    from transformers import BertModel

    return _save(folder, BertModel, WORDS, width, max_position_embeddings=64)


def _save(folder: Path, model_class: Any, words: Sequence[str], width: int, **more: Any) -> Path:
    import torch

    config = model_class.config_class(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder
