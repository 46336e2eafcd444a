"""The split "general": what the base model could do before, whose loss shows what fine-tuning forgets.

It is English prose: the first 4,327 bytes of chapter 11 of Jane Austen's *Persuasion* (1817, public domain)
with one line a paragraph, from the Debian package r-cran-janeaustenr 1.0.0-1; the file is ASCII and has the
SHA-256 1f405b171eb9d81c716ade4ea0dcf7bcc2903a9f46d04ef3c889584d7ec85373.
A base model whose tokenizer does not know English has the examples that the task gives in its place
(`Task.general_examples`), or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.finetune.data.batches import Row, encode_examples
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Example, Task, bos_ids

FILE = Path(__file__).with_name("general_text.txt")
WINDOW = 256
"""The number of tokens of the text that a model reads at once, or fewer if it has fewer positions."""


def make_general_split(task: Task, base_model: BaseModel) -> EvaluationSplit | None:
    """Return the split for a language model; None for a head, an image, or a tokenizer without a text."""
    if task.has_head:
        return None
    config, processor = base_model.model.config.get_text_config(), base_model.tokenizer
    window = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    if rows := cut_windows(FILE.read_text("ascii"), processor, window):
        return EvaluationSplit([Example("", "")] * len(rows), rows, window, processor)
    if examples := task.general_examples():
        return EvaluationSplit(examples, encode_examples(examples, task, processor), window, processor)
    return None


def cut_windows(text: str, tokenizer: Any, window: int) -> list[Row]:
    """Return a text in rows of `window` tokens, the last one with what remains.

    Each token is predicted once: from BOS and the tokens before it in its row if the tokenizer starts texts
    with BOS, else from the tokens before it, the first of which is the last one of the row before. So the
    first token of a text is not predicted without BOS.

    Returns:
        The rows; none if the tokenizer does not give the text back, for instance since it does not know the
        words.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            return []
    except Exception:  # the tokenizers of Hugging Face raise Exception itself for an unknown word
        return []
    bos = bos_ids(tokenizer)
    context = 0 if bos else 1
    rows = []
    for start in range(0, len(ids) - context, window):
        own = (*bos, *ids[start : start + window + context])
        rows.append(Row(own[:-1], own[1:], ()))
    return rows
