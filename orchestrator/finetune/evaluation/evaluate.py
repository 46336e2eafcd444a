"""Score lanes, or the base model, on a held-out split: the whole split, and each of its items."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from orchestrator.finetune.data.batches import Batch, DeviceBatch, Row, bucket_length, pad_rows
from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.evaluation.forward import predict
from orchestrator.finetune.evaluation.generate import EvaluatedLanes, generate_answers
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.tasks.base import IGNORE_INDEX, INVERSE_PERPLEXITY, Example, Task
from orchestrator.record.schema import ItemResults
from orchestrator.study.configuration import Configuration
from orchestrator.util import atomic_files, timeouts
from orchestrator.util.errors import UsageError, format_error, quote_value

MAX_BATCH_ROWS = 64
"""The largest number of items in an evaluation batch."""
MAX_BATCH_TOKENS = 4096
"""The largest number of tokens in an evaluation batch, unless 8 items have more."""
GRADING_BATCH = 64
"""Answers that a task grades in one call. A program that does not end takes several seconds, so grading all
answers of several lanes in one call could take longer than a trainer may show no progress."""
Scores = Mapping[str, Mapping[str, float]]
"""The scores of each split, by name."""


def plan_batches(lengths: Sequence[int], max_row_length: int) -> list[tuple[int, list[int]]]:
    """Group the items of a split into batches.

    Items of one bucket share batches of nearly equal size: for a small last batch the device might select
    another kernel, whose results differ in the last bits. The plan does not depend on the number of lanes.

    Args:
        lengths: The length of each item.
        max_row_length: The largest padded length, except for items that are longer.

    Returns:
        The padded length and the item numbers of each batch.
    """
    by_bucket: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        by_bucket.setdefault(bucket_length(length, max_row_length), []).append(item)
    plan = []
    for length, items in sorted(by_bucket.items()):
        batch_size = min(MAX_BATCH_ROWS, max(8, MAX_BATCH_TOKENS // max(1, length)))
        batch_count = -(-len(items) // batch_size)
        plan += [(length, part.tolist()) for part in np.array_split(items, batch_count)]
    return plan


@dataclass(frozen=True)
class EvaluationSplit:
    """The examples and tokenized rows of a split, in order.

    A split may be large and mapped from a file, so rows and batches are built only on access.
    """

    examples: Sequence[Example]
    rows: Sequence[Row]
    """The row of each example."""
    max_row_length: int
    """The longest padded length, except for rows that are longer."""
    processor: Any
    """The model's tokenizer or image processor."""

    @cached_property
    def batch_plan(self) -> Sequence[tuple[int, Sequence[int]]]:
        """The padded length and the item numbers of each batch of items that count in the loss."""
        loss_items = [i for i, example in enumerate(self.examples) if example.counts_in != "metric"]
        plan = plan_batches([len(self.rows[i].ids) for i in loss_items], self.max_row_length)
        return [(length, [loss_items[index] for index in indices]) for length, indices in plan]

    def batch(self, number: int) -> Batch:
        """Return a batch of the plan."""
        length, items = self.batch_plan[number]
        return pad_rows([self.rows[i] for i in items], length, self.processor.pad_token_id)

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches of the plan."""
        return map(self.batch, range(len(self.batch_plan)))

    @cached_property
    def flat_targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The targets that count in the loss, in the order of the batch plan.

        Returns:
            The targets, (targets,) float64; the number of targets of each item, in the same order; and the
            indices that sort these items by item number.
        """
        targets: list[Tensor] = []
        counts: list[int] = []
        for batch in self.batches:
            targets.append(batch.targets[batch.targets != IGNORE_INDEX])
            counts += batch.target_counts
        item_order = np.argsort([item for _, items in self.batch_plan for item in items])
        return torch.cat(targets).double().numpy(), np.array(counts), item_order

    def bits_per_byte(self, losses: np.ndarray) -> float:
        """Return the loss of text in bits per byte, for all tokenizers alike.

        It is the sum of the losses of all targets but special tokens, such as the end token, in bits, over
        the UTF-8 bytes of these targets as text; NaN without a byte. Special tokens have no text, and their
        number depends on the chat template.

        Args:
            losses: The losses in nats, (targets,), in the order of `flat_targets`.
        """
        is_counted = ~np.isin(self.flat_targets[0], self.processor.all_special_ids)
        return (
            float(losses[is_counted].sum() / math.log(2) / self._target_bytes)
            if self._target_bytes
            else math.nan
        )

    @cached_property
    def _target_bytes(self) -> int:
        """The bytes of the targets that count in the loss, without special tokens."""

        def count_bytes(ids: Sequence[int]) -> int:
            return len(self.processor.decode(ids, skip_special_tokens=True).encode())

        total = 0
        for row in (self.rows[item] for _, items in self.batch_plan for item in items):
            first = next(i for i, target in enumerate(row.targets) if target != IGNORE_INDEX)
            own = [int(target) for target in row.targets[first:] if target != IGNORE_INDEX]
            # After the id before it: some tokenizers leave out the blank before the first word of a text.
            total += count_bytes([row.ids[first], *own]) - count_bytes([row.ids[first]])
        return total

    @cached_property
    def graded_items(self) -> list[int]:
        """The numbers of the items that count in the metric."""
        return [i for i, example in enumerate(self.examples) if example.counts_in != "loss"]

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """The number of tokens in the prompt of each graded item."""
        return [len(self.rows[item].prompt) for item in self.graded_items]


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of one lane on a split."""

    scores: Mapping[str, float]
    """The scores of the split, by name.

    - "loss": nats per target token, text or image; the mean squared error of a regression task.
    - "bits_per_byte": the loss of text, see `EvaluationSplit.bits_per_byte`.
    - "accuracy": the share of targets that are the argmax of the logits; not for regression.
    - the task's metric: a function of `metrics` for a task with a head, exp(-loss) for INVERSE_PERPLEXITY,
      else the mean of `items.correct`.

    A split without items that count in the loss has no loss and no accuracy. A generation task has its
    metric only if answers were generated.
    """
    items: ItemResults
    """The results per item, in the order of item numbers.

    - `loss`: of the items that count in the loss.
    - `correct`: for generated answers, of the items that count in the metric: the mean grade of the item's
      samples. For other outputs, of the items that count in the loss: 0 or 1, or for regression
      1 - |error| / (the range of the split's targets), at least 0.
    - `answers`: the first sample of each generated answer, or the prediction of a head as text.
    """
    generate_seconds: float = field(default=0.0, compare=False)
    """The lane's share of the time in which answers were generated and graded."""


@torch.no_grad()
def evaluate(
    base_model: BaseModel,
    task: Task,
    split: EvaluationSplit,
    lanes: EvaluatedLanes,
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    predict_with_generate: bool = True,
    on_batch: Callable[[], None] = lambda: None,
) -> list[EvaluationResult]:
    """Score lanes on a split. The processes of the group share the batches.

    Args:
        base_model: The base model that carries the lanes' adapters.
        task: The task.
        split: The split.
        lanes: The lanes.
        process_group: The processes that evaluate the same lanes.
        predict_with_generate: Whether to generate and grade the answers of a generation task.
        on_batch: Called after every batch that is scored, generated or graded, to show progress.

    Returns:
        One result per lane, equal in all processes.

    Raises:
        UsageError: The task does not grade each answer with a number from 0 to 1, or has an unknown metric.
        RuntimeError: The task's grading would end the process.
    """
    results = [EvaluationResult({}, ItemResults())] * len(lanes.seeds)
    if split.batch_plan:
        values = _predict_targets(base_model, task, split, lanes, process_group, on_batch)
        results = [_score_predictions(task, split, *lane) for lane in zip(*values, strict=True)]
    if task.output != "generation" or not (predict_with_generate and split.graded_items):
        return results
    started = monotonic()
    prompts, length = [(i, split.rows[i].prompt) for i in split.graded_items], split.max_row_length
    generated = generate_answers(base_model, task, prompts, length, lanes, process_group, on_batch)
    graded = []
    grades_by_lane = _grade_generated(task, split, generated, process_group, on_batch)
    seconds = (monotonic() - started) / len(lanes.seeds)
    for result, grades, answers in zip(results, grades_by_lane, generated, strict=True):
        scores = {**result.scores, task.metric: float(grades.mean())}
        first_samples = tuple(samples[0] for samples in answers)
        items = ItemResults(tuple(grades.tolist()), result.items.loss, first_samples)
        graded.append(EvaluationResult(scores, items, seconds))
    return graded


@torch.no_grad()
def evaluate_loss(
    base_model: BaseModel,
    task: Task,
    split: EvaluationSplit,
    lanes: EvaluatedLanes,
    process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
    on_batch: Callable[[], None] = lambda: None,
) -> list[EvaluationResult]:
    """Return the loss of lanes on a split of text, as "loss" and "bits_per_byte"; see `evaluate`."""
    losses, _ = _predict_targets(base_model, task, split, lanes, process_group, on_batch)
    return [EvaluationResult(_score_losses(task, split, own), ItemResults()) for own in losses]


def _predict_targets(
    base_model: BaseModel,
    task: Task,
    split: EvaluationSplit,
    lanes: EvaluatedLanes,
    process_group: ProcessGroup,
    on_batch: Callable[[], None],
) -> np.ndarray:
    """Return losses and predictions, (2, lanes, targets) float64, in the order of the batch plan."""
    values: list[Tensor] = []  # for each batch of this process: losses and predictions, (2, lanes, targets)
    lane_count = len(lanes.seeds)
    with lanes.activate():
        for number in range(process_group.rank, len(split.batch_plan), process_group.world_size):
            batch = split.batch(number)
            on_device = DeviceBatch.copy_to(base_model.device, [batch] * lane_count)
            losses, predictions = predict(base_model, task, on_device)
            values.append(torch.stack([losses, predictions.to(losses.dtype)]).view(2, lane_count, -1))
            on_batch()
    # One copy from the device for all batches, because each copy waits for the device.
    own_batches: list[np.ndarray] = []
    if values:  # else there are more processes than batches
        joined = torch.cat(values, dim=-1).cpu().double()
        own_batches = [part.numpy() for part in joined.split([part.shape[-1] for part in values], dim=-1)]
    gathered = process_group.all_gather(own_batches)
    world_size = process_group.world_size
    in_order = [gathered[i % world_size][i // world_size] for i in range(len(split.batch_plan))]
    return np.concatenate(in_order, axis=-1)


def _score_predictions(
    task: Task, split: EvaluationSplit, losses: np.ndarray, predictions: np.ndarray
) -> EvaluationResult:
    """Score one lane from the losses and predictions of its targets, each (targets,)."""
    targets, counts, item_order = split.flat_targets
    starts = np.cumsum([0, *counts[:-1]])
    scores = _score_losses(task, split, losses)
    item_losses = (np.add.reduceat(losses, starts) / counts)[item_order]
    if task.output == "regression":
        correct = _closeness(predictions, targets)[item_order]
    else:
        hits = predictions == targets
        scores["accuracy"] = float(hits.mean())
        correct = np.logical_and.reduceat(hits, starts)[item_order].astype(float)
    answers: tuple[str, ...] = ()
    if task.output == "classification":
        answers = tuple(task.labels[int(value)] for value in predictions[item_order])
    elif task.has_head:
        answers = tuple(f"{value:.6g}" for value in predictions[item_order])
    if task.metric == INVERSE_PERPLEXITY:
        scores[task.metric] = math.exp(-scores["loss"])
    elif task.has_head:
        scores[task.metric] = metrics.get_metric(task)(predictions, targets)
    elif task.output == "teacher_forced":
        scores[task.metric] = float(correct.mean())
    item_grades = () if task.output == "generation" else tuple(correct.tolist())
    return EvaluationResult(scores, ItemResults(item_grades, tuple(item_losses.tolist()), answers))


def _score_losses(task: Task, split: EvaluationSplit, losses: np.ndarray) -> dict[str, float]:
    scores = {"loss": float(losses.mean())}
    return scores if task.has_head else scores | {"bits_per_byte": split.bits_per_byte(losses)}


def _grade_generated(
    task: Task,
    split: EvaluationSplit,
    generated: Sequence[Sequence[tuple[str, ...]]],
    process_group: ProcessGroup,
    on_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return the mean grade of each graded item's samples, (lanes, items).

    The processes of the group share the grading, since a grade may take a program run.

    Args:
        task: The task.
        split: The split.
        generated: The samples of each graded item, by lane.
        process_group: The processes that have the same answers.
        on_batch: Called after every `GRADING_BATCH` answers.
    """
    answers_to_grade = [
        (split.examples[item], answer)
        for lane in generated
        for item, samples in zip(split.graded_items, lane, strict=True)
        for answer in samples
    ]
    own_answers = answers_to_grade[process_group.rank :: process_group.world_size]
    own_grades: list[float] = []
    for first in range(0, len(own_answers), GRADING_BATCH):
        own_grades += _grade_batch(task, own_answers[first : first + GRADING_BATCH])
        on_batch()
    grades = np.zeros(len(answers_to_grade))
    for rank, rank_grades in enumerate(process_group.all_gather(own_grades)):
        grades[rank :: process_group.world_size] = rank_grades
    return grades.reshape(len(generated), len(split.graded_items), -1).mean(axis=2)


def _grade_batch(task: Task, answers: Sequence[tuple[Example, str]]) -> list[float]:
    """Return the grades of answers, each given with its example.

    Raises:
        UsageError: The task does not return one number from 0 to 1 for each answer.
        RuntimeError: The grading raises SystemExit.
    """
    try:
        grades = task.grade_all([example for example, _ in answers], [answer for _, answer in answers])
    except SystemExit as error:  # of a user's task; it would end the worker instead of failing the lane
        raise RuntimeError(f"grading ends the process: {format_error(error)}") from error
    if len(grades) != len(answers):
        problem = f"grade_all gives {len(grades)} grades for {len(answers)} answers."
        raise UsageError(f"Task {task.name!r}: {problem}")
    for grade, (_, answer) in zip(grades, answers, strict=True):
        if not 0 <= grade <= 1:  # refuses NaN as well
            problem = f"the grade of the answer {quote_value(answer)} is {grade!r}"
            raise UsageError(f"Task {task.name!r}: {problem}; must be a number from 0 to 1.")
    return grades


def _closeness(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return 1 - |error| / (range of the targets) of each item, 0 where that is negative or not finite."""
    spread = (targets.max() - targets.min()) or 1.0
    near = 1.0 - np.abs(predictions - targets) / spread
    return np.where(np.isfinite(near), np.maximum(near, 0.0), 0.0)


class BaselineScores:
    """The scores of a configuration's base model, without a lane, on the held-out splits of the task.

    They are computed once per store, because they are equal for all lanes on one model and task. A lane needs
    only the loss to start. The scores of generated answers take minutes: the first trainer that needs them
    generates the answers under a lock, and the others train meanwhile. A trainer waits for them only if one
    of its lanes finishes before they are in the store. A new object knows none of the scores.

        <folder>/letters-3f9c0a1b2c3d4e5f.untrained.json
            {split: {score: number}}; the file name has a hash of all that decides the scores
        <folder>/letters-3f9c0a1b2c3d4e5f.untrained-loss.json  the same, without scores of generated answers
        <folder>/.letters-3f9c0a1b2c3d4e5f.untrained.lock      held by the trainer that generates the answers

    Args:
        folder: The cache folder.
        configuration: The configuration, which names the model and the data.
        text: A split that depends on the model alone, in place of those of the task.
    """

    def __init__(
        self, folder: Path, configuration: Configuration, text: EvaluationSplit | None = None
    ) -> None:
        choice = configuration.task
        data: dict[str, Any] = {
            "task": asdict(replace(choice, name="" if choice.content else choice.name)),
            "length": configuration.batches.max_length,
        }
        if text is not None:
            data = {"text": [(row.ids, row.targets) for row in text.rows]}
        key_fields = data | {
            "model": [configuration.model.content, configuration.model.dtype],
            "loop": configuration.loop_numerics,
        }
        self._folder = folder
        key = hashlib.sha256(atomic_files.canonical_json(key_fields)).hexdigest()[:16]
        name = "general" if text is not None else choice.content or choice.name
        self._stem = f"{name}-{key}.untrained"
        self.scores: Scores = {}
        """The known scores: at least the validation loss once `load_or_compute_loss` has returned."""
        self.is_complete = False
        """True if the scores of generated answers are known, too, or the task has none. On rank 0 only."""

    def load_or_compute_loss(
        self, compute: Callable[[], Scores], has_answers: bool, process_group: ProcessGroup
    ) -> None:
        """Read the scores that need no generated answers, or compute and store them.

        Args:
            compute: Computes them in all workers of the trainer; called if they are not stored.
            has_answers: Whether the task has further scores, of generated answers.
            process_group: The workers, all of which call this method. Rank 0 decides and stores.
        """
        kind = "-loss" if has_answers else ""
        all_scores, found = process_group.all_gather((self._read(""), self._read(kind)))[0]
        self.is_complete = all_scores is not None or not has_answers
        found = all_scores or found
        if found is None:
            found = compute()
            if process_group.rank == 0:
                self._store(kind, found)
        self.scores = found

    def load_or_compute_all(
        self, compute: Callable[[], Scores], wait: bool = True, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Read all scores, or compute and store them, unless another trainer does so. Rank 0 only.

        Args:
            compute: Computes them; called if they are not stored and no other trainer computes them.
            wait: Whether to wait for a trainer that computes them; if it dies, this one takes over.
            on_wait: Called again and again during such a wait.
        """
        while not self.is_complete:
            found = self._read("")
            if found is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self._folder / f".{self._stem}.lock", timeout=0)
                try:
                    with lock:
                        # The trainer that held the lock before may have stored them.
                        found = self._read("") or self._store("", compute())
                except Timeout:
                    if not wait:
                        return
                    on_wait()
                    time.sleep(timeouts.BASELINE_POLL_SECONDS)
                    continue
            self.scores, self.is_complete = found, True

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._stem}{kind}.json"

    def _read(self, kind: str) -> Scores | None:
        with suppress(OSError, ValueError):  # a file that is absent or damaged is computed again
            return json.loads(atomic_files.verify_checksum(self._path(kind).read_bytes()))
        return None

    def _store(self, kind: str, scores: Scores) -> Scores:
        """Write scores to their file, and return them."""
        atomic_files.write_atomically(self._path(kind), atomic_files.add_checksum(json.dumps(scores)))
        return scores
