"""Evaluation splits that are tokenized in memory, without the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.finetune.data.batches import encode_examples
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.tasks.base import Example, Task


def tokenized_split(
    examples: Sequence[Example], task: Task, processor: Any, max_row_length: int
) -> EvaluationSplit:
    """Tokenize examples. `processor` is the model's tokenizer or image processor."""
    rows = encode_examples(examples, task, processor, max_row_length if task.has_head else None)
    return EvaluationSplit(examples, rows, max_row_length, processor.pad_token_id)
