"""Scores of several lanes at once on one split, item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.finetune.data import Batch, Row, encode, pad, scoring_plan
from orchestrator.finetune.forward import answer_logits, token_losses
from orchestrator.finetune.generate import answers
from orchestrator.finetune.models import Bench
from orchestrator.finetune.tasks.base import NO_LOSS, Example, Task
from orchestrator.record.schema import Items


@dataclass(frozen=True)
class Split:
    """A split ready to be scored: its examples and rows in order, and batches with the items they hold."""

    examples: Sequence[Example]
    rows: Sequence[Row]
    batches: Sequence[tuple[Batch, Sequence[int]]]
    cap: int

    @classmethod
    def of(cls, examples: Sequence[Example], task: Task, tokenizer: Any, cap: int) -> Split:
        rows = encode(examples, task, tokenizer)
        plan = scoring_plan([len(r.ids) for r in rows], cap)
        batches = [
            (pad([rows[i] for i in items], length, tokenizer.pad_token_id), items) for length, items in plan
        ]
        return cls(examples, rows, batches, cap)


@dataclass(frozen=True)
class Scored:
    """`scores`: "loss" (nats a token), "accuracy" (share of answer tokens that are the argmax,
    teacher-forced) and the task's metric (mean over items)."""

    scores: Mapping[str, float]
    items: Items


@torch.no_grad()
def evaluate(
    bench: Bench, task: Task, split: Split, lanes: int, rows: Callable[[], AbstractContextManager[Any]]
) -> list[Scored]:
    """One `Scored` a lane. Inside `rows()` the model takes `lanes` times a batch's rows, lane by lane."""
    losses, right = [], []
    order: list[int] = []
    tokens: list[int] = []
    with rows():
        for batch, items in split.batches:
            ids, targets = batch.ids.repeat(lanes, 1), batch.targets.repeat(lanes, 1)
            logits, labels = answer_logits(bench.model, ids, targets, bench.device)
            losses.append(token_losses(logits, labels).view(lanes, -1))
            right.append((logits.argmax(dim=-1) == labels).view(lanes, -1))
            order += items
            tokens += (batch.targets != NO_LOSS).sum(dim=1).tolist()
    # One copy from the device for all; (lanes, tokens of the split), item after item in `order`.
    by_token = torch.cat(losses, dim=1).cpu().double().numpy()
    hits = torch.cat(right, dim=1).cpu().numpy()
    starts = np.cumsum([0, *tokens[:-1]])
    place = np.argsort(order)
    loss = (np.add.reduceat(by_token, starts, axis=1) / np.array(tokens))[:, place]
    correct = np.logical_and.reduceat(hits, starts, axis=1)[:, place].astype(float)
    texts: list[tuple[str, ...]] = [()] * lanes
    if task.answers == "generated":
        texts = answers(bench, split.rows, split.cap, task.max_new_tokens, lanes, rows)
        correct = np.array(
            [[task.grade(e, text) for e, text in zip(split.examples, lane, strict=True)] for lane in texts]
        )
    return [
        Scored(
            {
                "loss": float(by_token[lane].mean()),
                "accuracy": float(hits[lane].mean()),
                task.metric: float(correct[lane].mean()),
            },
            Items(tuple(correct[lane].tolist()), tuple(loss[lane].tolist()), texts[lane]),
        )
        for lane in range(lanes)
    ]
