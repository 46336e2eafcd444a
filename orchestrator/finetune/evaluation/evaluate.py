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

from orchestrator.finetune.data.batches import Batch, Row, encode_examples, pad_rows, plan_batches
from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.evaluation.forward import compute_logits, compute_losses
from orchestrator.finetune.evaluation.generate import generate_answers
from orchestrator.finetune.models.loading import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Example, Task
from orchestrator.record.schema import ItemResults
from orchestrator.util.errors import UsageError, format_error, quote_value


@dataclass(frozen=True)
class EvaluationSplit:
    """A split ready to be scored: its examples and rows in order, and which items share a batch (`plan`: the
    padded length and their numbers, a batch), of those that count in the loss. Neither rows nor batches are
    in memory unless they are looked at: a split may be large, and lie on disk."""

    examples: Sequence[Example]
    rows: Sequence[Row]
    max_row_length: int
    pad_token_id: int

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], task: Task, processor: Any, max_row_length: int
    ) -> EvaluationSplit:
        rows = encode_examples(examples, task, processor, max_row_length if task.has_head else None)
        return cls(examples, rows, max_row_length, processor.pad_token_id)

    @cached_property
    def batch_plan(self) -> Sequence[tuple[int, Sequence[int]]]:
        loss_items = [i for i, example in enumerate(self.examples) if example.counts_in != "metric"]
        plan = plan_batches([len(self.rows[i].ids) for i in loss_items], self.max_row_length)
        return [(length, [loss_items[index] for index in indices]) for length, indices in plan]

    def batch(self, number: int) -> Batch:
        length, items = self.batch_plan[number]
        return pad_rows([self.rows[i] for i in items], length, self.pad_token_id)

    @property
    def batches(self) -> Iterator[tuple[Batch, Sequence[int]]]:
        """With the items that they hold, one after the other."""
        for number, (_, items) in enumerate(self.batch_plan):
            yield self.batch(number), items

    @cached_property
    def flat_targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The targets with loss, batch after batch (float64); how many each item has, in that order; and
        where each item stands in it."""
        target_parts = [
            (batch.targets[batch.targets != IGNORE_INDEX], batch.target_counts) for batch, _ in self.batches
        ]
        item_order = np.argsort([item for _, items in self.batch_plan for item in items])
        targets = torch.cat([targets for targets, _ in target_parts]).double().numpy()
        return targets, np.array([count for _, counts in target_parts for count in counts]), item_order

    @cached_property
    def graded_items(self) -> list[int]:
        """The items that count in the metric."""
        return [i for i, example in enumerate(self.examples) if example.counts_in != "loss"]


@dataclass(frozen=True)
class EvaluationResult:
    """`scores`: "loss" (nats a token or text, or the mean squared error), "accuracy" (share of answer tokens,
    teacher-forced, or of texts or images, that are the argmax) and the task's metric: the mean over items, or
    what `metrics.py` says of the whole split. Answers in words that were not generated have no metric, and a
    split without a loss neither loss nor accuracy.

    `items.correct` of a task with values is a closeness: 1 - |error| / spread of the split's values, or 0;
    of sampled answers the mean of an item's. `items.answers` are what was generated, the first sample of
    each, or what a head said. Both are of the items that count in the metric, `items.loss` of those that
    count in the loss."""

    scores: Mapping[str, float]
    items: ItemResults


@torch.no_grad()
def evaluate(
    base_model: BaseModel,
    task: Task,
    split: EvaluationSplit,
    lane_count: int,
    lane_rows: Callable[[], AbstractContextManager[Any]],
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    seeds: Sequence[int] | None = None,
    predict_with_generate: bool = True,
) -> list[EvaluationResult]:
    """One `Scored` a lane, the same on all of the team, which share the batches. Inside `rows()` the model
    takes `lanes` times a batch's rows, lane by lane. `seeds`: the lanes', which decide what is drawn (0 where
    not given); `generate`: whether answers in words are generated and graded."""
    scores: list[dict[str, float]] = [{} for _ in range(lane_count)]
    loss = correct = targets = predictions = np.zeros((lane_count, 0))
    texts: list[tuple[str, ...]] = [()] * lane_count
    if split.batch_plan:
        batch_losses, batch_predictions = [], []
        with lane_rows():
            for number in range(process_group.rank, len(split.batch_plan), process_group.world_size):
                batch = split.batch(number)
                logits, labels = compute_logits(base_model, task, Batch.concatenate([batch] * lane_count))
                batch_losses.append(compute_losses(logits, labels, task).view(lane_count, -1))
                prediction = logits if task.output == "regression" else logits.argmax(dim=-1)
                batch_predictions.append(prediction.view(lane_count, -1))
        rank_parts = process_group.all_gather(
            np.stack(
                [
                    _concatenate_on_cpu(batch_losses, lane_count),
                    _concatenate_on_cpu(batch_predictions, lane_count),
                ]
            )
        )
        targets, counts, item_order = split.flat_targets
        batch_ends = np.cumsum([len(items) for _, items in split.batch_plan])[:-1]
        target_losses, predictions = _merge_rank_parts(
            rank_parts, [int(item_counts.sum()) for item_counts in np.split(counts, batch_ends)]
        )

        # (lanes, targets of the split), batch after batch, from here on.
        starts = np.cumsum([0, *counts[:-1]])
        hits = predictions == targets
        loss = (np.add.reduceat(target_losses, starts, axis=1) / counts)[:, item_order]
        correct = np.logical_and.reduceat(hits, starts, axis=1)[:, item_order].astype(float)
        if task.output == "regression":
            correct = _closeness(predictions, targets)[:, item_order]
        if task.has_head:
            texts = [
                tuple(_format_prediction(task, value) for value in lane)
                for lane in predictions[:, item_order]
            ]
        for lane in range(lane_count):
            scores[lane]["loss"] = float(target_losses[lane].mean())
            if task.output != "regression":
                scores[lane]["accuracy"] = float(hits[lane].mean())
    if task.output == "generation":
        correct = np.zeros((lane_count, 0))
        if predict_with_generate and split.graded_items:
            prompts = [(i, split.rows[i].prompt) for i in split.graded_items]
            generated = generate_answers(
                base_model,
                task,
                prompts,
                split.max_row_length,
                seeds or [0] * lane_count,
                lane_rows,
                process_group,
            )
            correct = _grade_generated(task, split, generated, process_group)
            texts = [tuple(samples[0] for samples in lane) for lane in generated]
    found = []
    for lane in range(lane_count):
        if task.has_head:
            scores[lane][task.metric] = metrics.get_metric(task)(predictions[lane], targets)
        elif correct.size:
            scores[lane][task.metric] = float(correct[lane].mean())
        items = ItemResults(tuple(correct[lane].tolist()), tuple(loss[lane].tolist()), texts[lane])
        found.append(EvaluationResult(scores[lane], items))
    return found


def _grade_generated(
    task: Task,
    split: EvaluationSplit,
    generated: Sequence[Sequence[tuple[str, ...]]],
    process_group: ProcessGroup,
) -> np.ndarray:
    """(lanes, graded items): the mean over an item's samples. Each of the team grades a part: a grade may be
    a program that is run, and take its time."""
    answers_to_grade = [
        (split.examples[item], answer)
        for lane in generated
        for item, samples in zip(split.graded_items, lane, strict=True)
        for answer in samples
    ]
    own_answers = answers_to_grade[process_group.rank :: process_group.world_size]
    try:
        own_grades = task.grade_all(
            [example for example, _ in own_answers], [answer for _, answer in own_answers]
        )
    except SystemExit as error:  # of a user's task: it would end the worker, and fail no lane
        raise RuntimeError(f"grading ends the process: {format_error(error)}") from error
    if len(own_grades) != len(own_answers):
        raise UsageError(
            f"Task {task.name!r}: grade_all gives {len(own_grades)} grades for {len(own_answers)} answers."
        )
    for grade, (_, answer) in zip(own_grades, own_answers, strict=True):
        if not 0 <= grade <= 1:  # NaN as well
            raise UsageError(
                f"Task {task.name!r}: the grade of the answer {quote_value(answer)} is {grade!r}; must be a "
                "number from 0 to 1."
            )
    grades = np.zeros(len(answers_to_grade))
    for rank, rank_grades in enumerate(process_group.all_gather(own_grades)):
        grades[rank :: process_group.world_size] = rank_grades
    return grades.reshape(len(generated), len(split.graded_items), -1).mean(axis=2)


def _concatenate_on_cpu(batches: Sequence[Tensor], lanes: int) -> np.ndarray:
    """(lanes, targets) float64: one copy from the device for all batches."""
    if not batches:  # of a team larger than the plan
        return np.zeros((lanes, 0))
    return torch.cat(list(batches), dim=1).cpu().double().numpy()


def _merge_rank_parts(rank_parts: Sequence[np.ndarray], target_counts: Sequence[int]) -> np.ndarray:
    """What each of the team has of its batches (..., targets), batch after batch of the whole plan; `sizes`:
    the targets of each batch."""
    world_size = len(rank_parts)
    batches_by_rank = [
        np.split(part, np.cumsum(target_counts[i::world_size])[:-1], axis=-1)
        for i, part in enumerate(rank_parts)
    ]
    return np.concatenate(
        [batches_by_rank[i % world_size][i // world_size] for i in range(len(target_counts))], axis=-1
    )


def _closeness(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    spread = (targets.max() - targets.min()) or 1.0
    near = 1.0 - np.abs(predictions - targets) / spread
    return np.where(np.isfinite(near), np.maximum(near, 0.0), 0.0)


def _format_prediction(task: Task, prediction: float) -> str:
    return task.labels[int(prediction)] if task.output == "classification" else f"{prediction:.6g}"
