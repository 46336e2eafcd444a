"""Scores of several lanes at once on one split, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.data.batches import Batch, Row, encode, pad, scoring_plan
from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.evaluation.forward import losses, outputs
from orchestrator.finetune.evaluation.generate import answers
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import ALONE, Team
from orchestrator.finetune.tasks.base import NO_LOSS, Example, Task
from orchestrator.record.schema import Items
from orchestrator.util.errors import BadInput, quoted, reason


@dataclass(frozen=True)
class Split:
    """A split ready to be scored: its examples and rows in order, and which items share a batch (`plan`: the
    padded length and their numbers, a batch), of those that count in the loss. Neither rows nor batches are
    in memory unless they are looked at: a split may be large, and lie on disk."""

    examples: Sequence[Example]
    rows: Sequence[Row]
    cap: int
    padding: int

    @classmethod
    def of(cls, examples: Sequence[Example], task: Task, processor: Any, cap: int) -> Split:
        rows = encode(examples, task, processor, cap if task.has_head else None)
        return cls(examples, rows, cap, processor.pad_token_id)

    @cached_property
    def plan(self) -> Sequence[tuple[int, Sequence[int]]]:
        counting = [i for i, example in enumerate(self.examples) if example.scored != "grade"]
        plan = scoring_plan([len(self.rows[i].ids) for i in counting], self.cap)
        return [(length, [counting[place] for place in places]) for length, places in plan]

    def batch(self, number: int) -> Batch:
        length, items = self.plan[number]
        return pad([self.rows[i] for i in items], length, self.padding)

    @property
    def batches(self) -> Iterator[tuple[Batch, Sequence[int]]]:
        """With the items that they hold, one after the other."""
        for number, (_, items) in enumerate(self.plan):
            yield self.batch(number), items

    @cached_property
    def truth(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The targets with loss, batch after batch (float64); how many each item has, in that order; and
        where each item stands in it."""
        found = [(batch.targets[batch.targets != NO_LOSS], batch.counts) for batch, _ in self.batches]
        place = np.argsort([item for _, items in self.plan for item in items])
        targets = torch.cat([targets for targets, _ in found]).double().numpy()
        return targets, np.array([count for _, counts in found for count in counts]), place

    @cached_property
    def graded(self) -> list[int]:
        """The items that count in the metric."""
        return [i for i, example in enumerate(self.examples) if example.scored != "loss"]


@dataclass(frozen=True)
class Scored:
    """`scores`: "loss" (nats a token or text, or the mean squared error), "accuracy" (share of answer tokens,
    teacher-forced, or of texts or images, that are the argmax) and the task's metric: the mean over items, or
    what `metrics.py` says of the whole split. Answers in words that were not generated have no metric, and a
    split without a loss neither loss nor accuracy.

    `items.correct` of a task with values is a closeness: 1 - |error| / spread of the split's values, or 0;
    of sampled answers the mean of an item's. `items.answers` are what was generated, the first sample of
    each, or what a head said. Both are of the items that count in the metric, `items.loss` of those that
    count in the loss."""

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
    seeds: Sequence[int] | None = None,
    generate: bool = True,
) -> list[Scored]:
    """One `Scored` a lane, the same on all of the team, which share the batches. Inside `rows()` the model
    takes `lanes` times a batch's rows, lane by lane. `seeds`: the lanes', which decide what is drawn (0 where
    not given); `generate`: whether answers in words are generated and graded."""
    scores: list[dict[str, float]] = [{} for _ in range(lanes)]
    loss = correct = truth = said_of = np.zeros((lanes, 0))
    texts: list[tuple[str, ...]] = [()] * lanes
    if split.plan:
        lost, said = [], []
        with rows():
            for number in range(team.rank, len(split.plan), team.size):
                batch = split.batch(number)
                logits, labels = outputs(bench, task, Batch.joined([batch] * lanes))
                lost.append(losses(logits, labels, task).view(lanes, -1))
                word = logits if task.answers == "value" else logits.argmax(dim=-1)
                said.append(word.view(lanes, -1))
        parts = team.gather(np.stack([_on_cpu(lost, lanes), _on_cpu(said, lanes)]))
        truth, counts, place = split.truth
        cut = np.cumsum([len(items) for _, items in split.plan])[:-1]
        by_target, said_of = _in_order(parts, [int(of.sum()) for of in np.split(counts, cut)])

        # (lanes, targets of the split), batch after batch, from here on.
        starts = np.cumsum([0, *counts[:-1]])
        hits = said_of == truth
        loss = (np.add.reduceat(by_target, starts, axis=1) / counts)[:, place]
        correct = np.logical_and.reduceat(hits, starts, axis=1)[:, place].astype(float)
        if task.answers == "value":
            correct = _closeness(said_of, truth)[:, place]
        if task.has_head:
            texts = [tuple(_word(task, value) for value in lane) for lane in said_of[:, place]]
        for lane in range(lanes):
            scores[lane]["loss"] = float(by_target[lane].mean())
            if task.answers != "value":
                scores[lane]["accuracy"] = float(hits[lane].mean())
    if task.answers == "generated":
        correct = np.zeros((lanes, 0))
        if generate and split.graded:
            prompts = [(i, split.rows[i].prompt) for i in split.graded]
            told = answers(bench, task, prompts, split.cap, seeds or [0] * lanes, rows, team)
            correct = _worth(task, split, told, team)
            texts = [tuple(samples[0] for samples in lane) for lane in told]
    found = []
    for lane in range(lanes):
        if task.has_head:
            scores[lane][task.metric] = metrics.of(task)(said_of[lane], truth)
        elif correct.size:
            scores[lane][task.metric] = float(correct[lane].mean())
        items = Items(tuple(correct[lane].tolist()), tuple(loss[lane].tolist()), texts[lane])
        found.append(Scored(scores[lane], items))
    return found


def _worth(task: Task, split: Split, told: Sequence[Sequence[tuple[str, ...]]], team: Team) -> np.ndarray:
    """(lanes, graded items): the mean over an item's samples. Each of the team grades a part: a grade may be
    a program that is run, and take its time."""
    said = [
        (split.examples[item], answer)
        for lane in told
        for item, samples in zip(split.graded, lane, strict=True)
        for answer in samples
    ]
    mine = said[team.rank :: team.size]
    try:
        worths = task.grade_all([example for example, _ in mine], [answer for _, answer in mine])
    except SystemExit as error:  # of a user's task: it would end the worker, and fail no lane
        raise RuntimeError(f"grading ends the process: {reason(error)}") from error
    if len(worths) != len(mine):
        raise BadInput(f"Task {task.name!r}: grade_all gives {len(worths)} grades for {len(mine)} answers.")
    for worth, (_, answer) in zip(worths, mine, strict=True):
        if not 0 <= worth <= 1:  # NaN as well
            raise BadInput(
                f"Task {task.name!r}: the grade of the answer {quoted(answer)} is {worth!r}; must be a "
                "number from 0 to 1."
            )
    whole = np.zeros(len(said))
    for rank, theirs in enumerate(team.gather(worths)):
        whole[rank :: team.size] = theirs
    return whole.reshape(len(told), len(split.graded), -1).mean(axis=2)


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
