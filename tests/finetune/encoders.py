"""Small encoders with random weights, saved like the published checkpoints that classification starts from.

They have the published model and tokenizer classes, two layers, and weights as large as trained weights.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.finetune.sources import base_store

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save(kind: str, folder: Path, **config: Any) -> Path:
    """Save a small model of a kind, with the same weights every time, and return the folder."""
    tokenizer, make = KINDS[kind]
    words = tokenizer()
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    with torch.random.fork_rng(devices=[]), base_store.suppress_transformers_logging():
        torch.manual_seed(0)
        model = make({"max_position_embeddings": 258, **ids, **config})
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "LayerNorm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)  # with 0.02, outputs would hardly differ
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def _roberta(config: Mapping[str, Any]) -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(**SIZES, type_vocab_size=1, bos_token_id=0, eos_token_id=2, **config)
    )


def _bert(config: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, **config))


def _electra(config: Mapping[str, Any]) -> Any:
    from transformers import ElectraConfig, ElectraForPreTraining

    return ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=16, **config))


def _distilbert(config: Mapping[str, Any]) -> Any:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, **config))


def _deberta_v1(config: Mapping[str, Any]) -> Any:
    """Return a small model with the architecture of microsoft/deberta-base."""
    from transformers import DebertaConfig, DebertaForMaskedLM

    special = {"relative_attention": True, "max_relative_positions": -1, "pos_att_type": "c2p|p2c"}
    return DebertaForMaskedLM(
        DebertaConfig(**SIZES, **special, position_biased_input=False, type_vocab_size=0, **config)
    )


def _deberta(config: Mapping[str, Any]) -> Any:
    """Return a small model with the architecture of microsoft/deberta-v3-base."""
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    special = {"relative_attention": True, "max_relative_positions": -1, "pos_att_type": "p2c|c2p"}
    special |= {"position_buckets": 32, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    special |= {"position_biased_input": False, "type_vocab_size": 0}
    return DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, **special, **config))


def _deberta_conv(config: Mapping[str, Any]) -> Any:
    """Return a small model with the architecture of microsoft/deberta-v2-xlarge."""
    return _deberta({"conv_kernel_size": 3, "conv_act": "gelu", **config})


def _bytes(begin: str, pad: str, end: str, unknown: str, mask: str) -> dict[str, int]:
    """Return a vocabulary of byte-level BPE without merges, which can encode every text."""
    from tokenizers import pre_tokenizers

    words = (begin, pad, end, unknown, *sorted(pre_tokenizers.ByteLevel.alphabet()), mask)
    return {word: number for number, word in enumerate(words)}


def _roberta_words() -> Any:
    from transformers import RobertaTokenizer

    return RobertaTokenizer(vocab=_bytes("<s>", "<pad>", "</s>", "<unk>", "<mask>"), merges=[])


def _deberta_v1_words() -> Any:
    from transformers import DebertaTokenizer

    return DebertaTokenizer(vocab=_bytes("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), merges=[])


def _bert_words() -> Any:
    from transformers import BertTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters))
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _deberta_words() -> Any:
    from transformers import DebertaV2Tokenizer

    pieces = [(piece, 0.0) for piece in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    pieces += [("▁", -4.0), *((f"▁{letter}", -2.0) for letter in string.ascii_lowercase)]
    return DebertaV2Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in string.printable[:94])])


KINDS: Mapping[str, tuple[Callable[[], Any], Callable[[Mapping[str, Any]], Any]]] = {
    "roberta": (_roberta_words, _roberta),
    "bert": (_bert_words, _bert),
    "electra": (_bert_words, _electra),
    "distilbert": (_bert_words, _distilbert),
    "deberta": (_deberta_words, _deberta),
    "deberta-conv": (_deberta_words, _deberta_conv),
    "deberta-v1": (_deberta_v1_words, _deberta_v1),
}
