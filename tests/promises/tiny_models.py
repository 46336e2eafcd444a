"""Base models in a folder, of a few thousand random weights, as a user has them from anywhere."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

WORDS = ("<pad>", "<eos>", "<unk>", *string.ascii_lowercase, *string.digits, "=", "copy", "ham", "spam")


def tokenizer() -> Any:
    """Return a tokenizer of one token for each of `WORDS`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path, width: int = 32) -> Path:
    """Save a Llama of two blocks, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _save(LlamaForCausalLM(config), folder)


def bert(folder: Path, width: int = 32) -> Path:
    """Save a BERT of two blocks, the same each time."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _save(BertModel(config), folder)
