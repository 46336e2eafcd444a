"""Scores of a plain model on `letters`, computed without this project's engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.record.schema import Record


def validation_scores(model: Any, folder: Path, record: Record) -> dict[str, float]:
    """Return loss and exact match (every label is the argmax) on the validation split of a record.

    Args:
        model: A causal language model of transformers or PEFT, in eval mode.
        folder: The folder of the tokenizer.
        record: The record of the lane.
    """
    tokenizer, task = AutoTokenizer.from_pretrained(folder), tasks.get("letters")
    examples = task.examples("validation", record.configuration.task.validation_size)
    rows = [task.encode(example, tokenizer) for example in examples]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids for row in rows])).logits[:, :-1].float()
    labels = torch.tensor([row.labels for row in rows])[:, 1:]
    right = (logits.argmax(-1) == labels) | (labels == -100)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    return {"exact_match": right.all(dim=1).double().mean().item(), "loss": loss.item()}


def recorded_scores(record: Record) -> dict[str, float]:
    """Return what `validation_scores` returns, as the record has it."""
    last = [each for each in record.evaluations if each.split == "validation"][-1]
    return {name: last.scores[name] for name in ("exact_match", "loss")}


def run_card(folder: Path, text: str = "unk a c b d e =") -> dict[str, Any]:
    """Run the Python lines in the README.md of an export, with a text as input, and return the variables."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert blocks
    variables: dict[str, Any] = {}
    for code in blocks:
        exec(code.replace("FOLDER", str(folder)).replace("INPUT", text), variables)
    return variables
