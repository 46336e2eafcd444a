"""Scores of several lanes at once on one split, item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune import metrics
from orchestrator.finetune.data import Batch, Row, encode, pad, scoring_plan
from orchestrator.finetune.forward import losses, outputs
from orchestrator.finetune.generate import answers
from orchestrator.finetune.models import Bench
from orchestrator.finetune.tasks.base import NO_LOSS, Example, Task
from orchestrator.finetune.team import ALONE, Team
from orchestrator.record.schema import Items


@dataclass(frozen=True)
class Split:
    """A split ready to be scored: its examples and rows in order, and batches with the items they hold."""

    examples: Sequence[Example]
    rows: Sequence[Row]
    batches: Sequence[tuple[Batch, Sequence[int]]]
    cap: int

    @classmethod
    def of(cls, examples: Sequence[Example], task: Task, processor: Any, cap: int) -> Split:
        rows = encode(examples, task, processor, cap if task.has_head else None)
        plan = scoring_plan([len(r.ids) for r in rows], cap)
        batches = [
            (pad([rows[i] for i in items], length, processor.pad_token_id), items) for length, items in plan
        ]
        return cls(examples, rows, batches, cap)


@dataclass(frozen=True)
class Scored:
    """`scores`: "loss" (nats a token or text, or the mean squared error), "accuracy" (share of answer tokens,
    teacher-forced, or of texts or images, that are the argmax) and the task's metric: the mean over items, or
    what `metrics.py` says of the whole split.

    `items.correct` of a task with values is a closeness: 1 - |error| / spread of the split's values, or 0.
    `items.answers` are what was generated, or what a head said."""

    scores: Mapping[str, float]
    items: Items


@torch.no_grad()
def evaluate(
    bench: Bench,
    task: Task,
    split: Split,
    lanes: int,
    rows: Callable[[], AbstractContextManager[Any]],
    team: Team = ALONE,
) -> list[Scored]:
    """One `Scored` a lane, the same on all of the team, which share the batches. Inside `rows()` the model
    takes `lanes` times a batch's rows, lane by lane."""
    lost, said = [], []
    with rows():
        for batch, _ in split.batches[team.rank :: team.size]:
            logits, labels = outputs(bench, task, Batch.joined([batch] * lanes))
            lost.append(losses(logits, labels, task).view(lanes, -1))
            word = logits if task.answers == "value" else logits.argmax(dim=-1)
            said.append(word.view(lanes, -1))
    parts = team.gather(np.stack([_on_cpu(lost, lanes), _on_cpu(said, lanes)]))
    by_target, said_of = _in_order(parts, [batch.tokens for batch, _ in split.batches])

    # (lanes, targets of the split), batch after batch, from here on.
    truth = torch.cat([b.targets[b.targets != NO_LOSS] for b, _ in split.batches]).double().numpy()
    counts = np.array([count for batch, _ in split.batches for count in batch.counts])
    place = np.argsort([item for _, items in split.batches for item in items])
    starts = np.cumsum([0, *counts[:-1]])
    hits = said_of == truth
    loss = (np.add.reduceat(by_target, starts, axis=1) / counts)[:, place]
    correct = np.logical_and.reduceat(hits, starts, axis=1)[:, place].astype(float)
    texts: list[tuple[str, ...]] = [()] * lanes
    if task.answers == "value":
        correct = _closeness(said_of, truth)[:, place]
    if task.answers == "generated":
        texts = answers(bench, split.rows, split.cap, task.max_new_tokens, lanes, rows, team)
        correct = np.array(
            [[task.grade(e, text) for e, text in zip(split.examples, lane, strict=True)] for lane in texts]
        )
    elif task.has_head:
        texts = [tuple(_word(task, value) for value in lane) for lane in said_of[:, place]]
    found = []
    for lane in range(lanes):
        scores = {"loss": float(by_target[lane].mean())}
        if task.answers != "value":
            scores["accuracy"] = float(hits[lane].mean())
        if task.has_head:
            scores[task.metric] = metrics.of(task)(said_of[lane], truth)
        else:
            scores[task.metric] = float(correct[lane].mean())
        items = Items(tuple(correct[lane].tolist()), tuple(loss[lane].tolist()), texts[lane])
        found.append(Scored(scores, items))
    return found


def _on_cpu(batches: Sequence[Tensor], lanes: int) -> np.ndarray:
    """(lanes, targets) float64: one copy from the device for all batches."""
    if not batches:  # of a team larger than the plan
        return np.zeros((lanes, 0))
    return torch.cat(list(batches), dim=1).cpu().double().numpy()


def _in_order(parts: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """What each of the team has of its batches (..., targets), batch after batch of the whole plan; `sizes`:
    the targets of each batch."""
    team = len(parts)
    cut = [np.split(part, np.cumsum(sizes[i::team])[:-1], axis=-1) for i, part in enumerate(parts)]
    return np.concatenate([cut[i % team][i // team] for i in range(len(sizes))], axis=-1)


def _closeness(said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    spread = (truth.max() - truth.min()) or 1.0
    near = 1.0 - np.abs(said - truth) / spread
    return np.where(np.isfinite(near), np.maximum(near, 0.0), 0.0)


def _word(task: Task, said: float) -> str:
    return task.labels[int(said)] if task.answers == "label" else f"{said:.6g}"
