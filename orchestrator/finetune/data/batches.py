"""Rows and batches: examples are tokenized, drawn in an order that depends only on the seed, and padded.

Labels are shifted here and nowhere else: `targets[i]` is the label of the prediction made after `ids[i]`. A
task with a head has one target per row, at the last token. An image has no ids: its length is 0, and its file
is decoded when its batch is computed (`image_processor`).

Rows are padded on the right. A causal model needs no attention mask: its tokens do not attend to the padding
after them, and padding does not count in the loss. Other models get a mask in `evaluation.forward`.

The rows of an optimizer step are sorted by length before they are cut into micro-batches, so that there is
little padding. Micro-batches of long rows have fewer rows, so that all take about the same memory and time.
The loss of a step is divided by the number of targets in all its rows, so the objective does not depend on
these numbers. The micro-batches depend only on the lane's seed, the step, the batch sizes and the training
rows, not on the lane group, the workers or earlier calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.process_group import copy_without_waiting
from orchestrator.finetune.tasks.base import IGNORE_INDEX, EncodedExample, Example, Image, Task
from orchestrator.study.configuration import BatchConfig
from orchestrator.util.errors import UsageError, format_error, quote_value

TOKENIZER_BATCH_SIZE = 1024
"""The number of examples that are tokenized in one call."""
SAMPLED_ROWS = 1024
"""Approximate number of training rows whose lengths decide the sizes of micro-batches."""


@dataclass(frozen=True)
class Row:
    """A tokenized example. `dataset_cache.ROW_COLUMNS` has a column for each field but the image."""

    ids: tuple[int, ...]
    """Token ids, without the last one if the answer consists of tokens; empty for an image."""
    targets: tuple[float, ...]
    """The label of the prediction after each id; IGNORE_INDEX where the prediction does not count in the
    loss. An image has one label."""
    prompt: tuple[int, ...]
    """Token ids of the prompt, from which an answer is generated."""
    second_segment_start: int | None = None
    """The index at which the second text begins, None without one."""
    image: Image | None = None
    """The image of an image task."""


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Rows that are padded on the right to one length."""

    ids: Tensor
    """Token ids, (rows, length) int64; (rows, 0) for images."""
    lengths: Tensor
    """The length of each row without padding, (rows,) int64."""
    second_segment_starts: Tensor
    """The index at which each row's second text begins, or the row's length without one, (rows,) int64."""
    images: tuple[Image, ...] = ()
    """One image per row for an image task, else none."""

    @property
    def length(self) -> int:
        """The padded length of the rows."""
        return self.ids.shape[1]

    @property
    def attention_mask(self) -> Tensor:
        """A mask that is False at padding, (rows, length) bool; (rows, 0) for images."""
        return torch.arange(self.length, device=self.lengths.device) < self.lengths.unsqueeze(1)

    @property
    def token_type_ids(self) -> Tensor:
        """Token types: 1 in the second text, 0 elsewhere, (rows, length) int64."""
        columns = torch.arange(self.length, device=self.lengths.device)
        return (self.attention_mask & (columns >= self.second_segment_starts.unsqueeze(1))).long()


@dataclass(frozen=True, kw_only=True)
class Batch(PaddedRows):
    """Padded rows on the CPU, with their labels."""

    targets: Tensor
    """Labels, (rows, length) int64, or float64 for a regression task; (rows, 1) for images."""

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """Return the rows of batches of equal length as one batch."""
        return cls(
            ids=torch.cat([b.ids for b in batches]),
            targets=torch.cat([b.targets for b in batches]),
            lengths=torch.cat([b.lengths for b in batches]),
            second_segment_starts=torch.cat([b.second_segment_starts for b in batches]),
            images=tuple(image for b in batches for image in b.images),
        )

    @cached_property
    def target_positions(self) -> Tensor:
        """The indices, in the flattened targets, of those that count in the loss, (targets,) int64."""
        return (self.targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)

    @cached_property
    def target_counts(self) -> tuple[int, ...]:
        """The number of targets of each row that count in the loss."""
        return tuple((self.targets != IGNORE_INDEX).sum(dim=1).tolist())

    @property
    def target_count(self) -> int:
        """The number of targets that count in the loss."""
        return len(self.target_positions)


@dataclass(frozen=True, kw_only=True)
class DeviceBatch(PaddedRows):
    """Padded rows of one or several lanes on a device, with the positions and labels of their targets.

    Targets with the label IGNORE_INDEX are removed on the CPU. On a GPU the host would have to wait for the
    number of the remaining targets, which is a size of tensors.
    """

    target_positions: Tensor
    """The indices of the targets in the flattened (rows, length) positions, (targets,) int64."""
    labels: Tensor
    """The label of each target, (targets,) int64, or float64 for a regression task."""
    weights: Tensor
    """The weight of each target's loss in the objective, (targets,) float64."""
    lane_target_counts: tuple[int, ...]
    """The number of targets of each lane. The targets of a lane follow those of the lane before."""
    first_target_column: int
    """The first column in which some row has a target."""

    @classmethod
    def copy_to(
        cls, device: torch.device, batches: Sequence[Batch], weights: Sequence[float] | None = None
    ) -> DeviceBatch:
        """Copy one batch per lane to a device, in one transfer for which the host does not wait.

        Args:
            device: The device.
            batches: One batch for each lane, of equal size.
            weights: For each lane, the weight of each of its targets' losses; by default
                1 / (number of all targets).
        """
        joined = Batch.concatenate(batches)
        counts = tuple(batch.target_count for batch in batches)
        if weights is None:
            weights = [1 / max(1, sum(counts))] * len(counts)
        positions = joined.target_positions
        parts = [joined.ids, joined.lengths, joined.second_segment_starts]
        parts += [positions, joined.targets.flatten()[positions]]
        parts += [torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(counts))]
        ids, lengths, starts, moved_positions, labels, moved_weights = _move_together(parts, device)
        columns = positions % max(1, joined.length)
        return cls(
            ids=ids,
            lengths=lengths,
            second_segment_starts=starts,
            images=joined.images,
            target_positions=moved_positions,
            labels=labels,
            weights=moved_weights,
            lane_target_counts=counts,
            first_target_column=int(columns.min()) if len(columns) else 0,
        )


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of 8-byte types to a device as one buffer, and return them there as views of it."""
    buffer = copy_without_waiting(torch.cat([t.reshape(-1).view(torch.int64) for t in tensors]), device)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    return [p.view(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]


def bucket_length(length: int, max_row_length: int) -> int:
    """Return the length that a row is padded to: 8, 16, 24, 32, 48, 64, 96, 128, and then multiples of 64.

    Args:
        length: The length of the row. 0, the length of images, stays 0.
        max_row_length: The largest padded length, unless `length` is larger.
    """
    unit = next((unit for unit in (8, 16, 32) if length <= 4 * unit), 64)
    size = -(-length // unit) * unit
    return min(size, max(max_row_length, length))


def compute_max_row_length(task: Task, max_length: int) -> int:
    """Return the largest number of ids in a training row of up to `max_length` tokens.

    A row for teacher forcing lacks the last token, which is only predicted.
    """
    return max_length if task.has_head else max_length - 1


def encode_examples(
    examples: Sequence[Example], task: Task, processor: Any, max_length: int | None = None
) -> list[Row]:
    """Tokenize examples into a list; `iter_encoded_examples` describes the arguments."""
    return list(iter_encoded_examples(examples, task, processor, max_length))


def iter_encoded_examples(
    examples: Sequence[Example],
    task: Task,
    processor: Any,
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Row]:
    """Tokenize examples.

    Args:
        examples: The examples.
        task: Their task.
        processor: The model's tokenizer; not used for images.
        max_length: The largest number of tokens of an example; None if examples are not truncated. A longer
            example loses its end, and is left out if nothing of its answer remains. For a head, a longer
            text keeps its last token, which marks its end, and `Task.encode_truncated` truncates a pair.
        progress: Receives the number of examples done, from time to time.

    Yields:
        The rows, in the order of examples.

    Raises:
        UsageError: No example remains, or one of them has no token to score or to read.
    """
    if task.inputs == "image":
        yield from (to_image_row(example, task, number) for number, example in enumerate(examples))
        return
    is_empty = True
    for start in range(0, len(examples), TOKENIZER_BATCH_SIZE):
        block = examples[start : start + TOKENIZER_BATCH_SIZE]
        encoded_block = encode_block(block, task, processor, start)
        for number, (example, encoded) in enumerate(zip(block, encoded_block, strict=True), start):
            if _has_empty_input(encoded, example, task, held_out=max_length is None):
                raise UsageError(
                    f"Task {task.name!r}: the prompt of example {number} is empty: the model's tokenizer "
                    "makes no token of it."
                )
            is_head_pair = task.has_head and example.pair is not None
            if is_head_pair and max_length is not None and len(encoded.ids) > max_length:
                encoded = task.encode_truncated(example, processor, max_length)
            if (row := _to_row(example, encoded, task, max_length)) is not None:
                is_empty = False
                yield row
            elif max_length is None:
                raise UsageError(
                    f"Task {task.name!r}: example {number} has no token to score (empty answer or prompt)."
                )
        progress(start + len(block))
    if is_empty:
        raise UsageError(
            f"Task {task.name!r}: no training example keeps a part of its answer within max_length "
            f"{max_length}. Raise it."
        )


def encode_block(
    examples: Sequence[Example], task: Task, processor: Any, first_index: int
) -> list[EncodedExample]:
    """Tokenize examples.

    Args:
        examples: The examples.
        task: Their task.
        processor: The model's tokenizer.
        first_index: The number of the first example in its split, for the error.

    Raises:
        UsageError: An example cannot be tokenized, for instance because a word-level tokenizer has no token
            for unknown words, or because a user's `encode` raises or ends the process. The error names the
            first such example.
    """
    try:
        return task.encode_all(examples, processor)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # the tokenizers of Hugging Face raise Exception itself
        for number, example in enumerate(examples, first_index):
            try:
                task.encode_all([example], processor)
            except (Exception, SystemExit) as one:
                text = quote_value(f"{example.prompt} {example.answer}")
                raise UsageError(
                    f"Task {task.name!r}: {format_error(one)}, where example {number}, {text}, is encoded; "
                    "correct the task or the example, or take a --model whose tokenizer knows its words."
                ) from one
        raise UsageError(
            f"Task {task.name!r}: {format_error(error)}, where its examples are encoded together; "
            "correct the task."
        ) from error


def to_image_row(example: Example, task: Task, number: int) -> Row:
    """Return the row of an example of an image task.

    Args:
        example: The example.
        task: The task.
        number: The number of the example in its split, for the error.

    Raises:
        UsageError: The example has no image.
    """
    if example.image is None:
        raise UsageError(f"Task {task.name!r} is an image task, but example {number} has no image.")
    return Row((), (task.target(example),), (), image=example.image)


def _has_empty_input(encoded: EncodedExample, example: Example, task: Task, held_out: bool) -> bool:
    """Return whether there is no token for a head to read, or to generate an answer from."""
    if task.has_head:
        return not encoded.ids
    generated = held_out and task.output == "generation" and example.counts_in != "loss"
    return generated and encoded.prompt_length == 0


def _to_row(example: Example, encoded: EncodedExample, task: Task, max_length: int | None) -> Row | None:
    """Return the row of a tokenized example, None if nothing of its answer remains."""
    if task.has_head:
        ids = encoded.ids
        if max_length is not None and len(ids) > max_length:
            ids = (*ids[: max_length - 1], ids[-1])
        targets = (*[IGNORE_INDEX] * (len(ids) - 1), task.target(example))
        return Row(ids, targets, ids, encoded.second_segment_start)
    ids, labels = encoded.ids[:max_length], encoded.labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return None
    return Row(ids[:-1], labels[1:], encoded.ids[: encoded.prompt_length])


def pad_rows(rows: Sequence[Row], length: int, pad_token_id: int) -> Batch:
    """Pad rows on the right to `length` and return them as a batch."""
    is_regression = any(isinstance(r.targets[-1], float) for r in rows)
    # NumPy converts a tuple several times faster than torch.tensor.
    ids = np.full((len(rows), length), pad_token_id, np.int64)
    targets = np.full((len(rows), length or 1), IGNORE_INDEX, np.float64 if is_regression else np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        targets[number, : len(row.targets)] = row.targets
    segment_starts = [len(r.ids) if (n := r.second_segment_start) is None else n for r in rows]
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        lengths=torch.tensor([len(r.ids) for r in rows]),
        second_segment_starts=torch.tensor(segment_starts),
        images=tuple(r.image for r in rows if r.image is not None),
    )


def make_training_batch(
    rows: Sequence[Row], seed: int, start: int, count: int, max_row_length: int, pad_token_id: int
) -> Batch:
    """Return a batch of a lane's training sequence, padded to the bucket of its longest row.

    Args:
        rows: The training rows.
        seed: The lane's seed, which decides the order of rows.
        start: The position of the first row in the sequence, which is endless.
        count: The number of rows.
        max_row_length: The largest padded length, as `compute_max_row_length` returns it.
        pad_token_id: The id of the padding token.
    """
    drawn = [rows[number] for number in shuffled_indices(seed, len(rows), start, count)]
    return pad_rows(drawn, bucket_length(max(len(r.ids) for r in drawn), max_row_length), pad_token_id)


def shuffled_indices(seed: int, size: int, start: int, count: int) -> list[int]:
    """Return `count` indices of the endless training sequence, from position `start` on.

    The sequence has one permutation of all `size` rows per epoch. The lane's seed decides the permutations.
    """
    positions = range(start, start + count)
    return [int(_permutation(seed, size, position // size)[position % size]) for position in positions]


@lru_cache(maxsize=64)
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises that its streams never change; torch does not.
    return np.random.RandomState([seed % 2**32, seed // 2**32, epoch]).permutation(size)


class Share(NamedTuple):
    """The rows of a micro-batch that a worker computes."""

    micro_batch: int
    """The number of the micro-batch within its step."""
    first_row: int
    last_row: int
    """The row after the last one of the share."""
    row_count: int
    """The number of rows of the whole micro-batch."""


def plan_row_counts(lengths: Sequence[int], batches: BatchConfig) -> tuple[int, ...]:
    """Return the number of rows in each micro-batch of a step, the micro-batch with the longest rows first.

    The numbers are the same for all steps and lanes, so that lanes can be computed together. They minimize
    the tokens of the largest micro-batch, padding included, in a step whose sorted rows have quantiles of
    `lengths` as their lengths.

    Args:
        lengths: Padded lengths of training rows, at least one.
        batches: The number of micro-batches, and their mean number of rows.
    """
    count, total = batches.accumulation, batches.accumulation * batches.batch_size
    descending = sorted((max(1, length) for length in lengths), reverse=True)
    expected = [descending[(2 * i + 1) * len(descending) // (2 * total)] for i in range(total)]
    for limit in sorted({length * rows for length in set(expected) for rows in range(1, total + 1)}):
        counts: list[int] = []
        for left in range(count, 0, -1):  # micro-batches that are still to be filled
            first = sum(counts)
            # Each later micro-batch needs a row.
            counts.append(min(max(1, limit // expected[min(first, total - 1)]), total - first - (left - 1)))
        firsts = [0, *accumulate(counts)]
        if firsts.pop() == total and all(
            n * expected[first] <= limit for n, first in zip(counts, firsts, strict=True)
        ):
            return tuple(counts)
    raise AssertionError("the largest limit allows all rows of a step in one micro-batch")


def assign_rows(counts: Sequence[int], rank: int, world_size: int) -> list[Share]:
    """Return the shares of a worker in every step.

    Worker r gets the whole micro-batches r, r + W, .... The rows of a micro-batch are split only if there are
    fewer micro-batches than workers, because a pass over few rows takes nearly as long as one over many. The
    workers' numbers of rows then differ by one at most.

    Args:
        counts: The number of rows of each micro-batch.
        rank: The worker.
        world_size: W, the number of workers; at most the number of rows in a step.
    """
    if len(counts) >= world_size:
        return [Share(n, 0, counts[n], counts[n]) for n in range(rank, len(counts), world_size)]
    total = sum(counts)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    shares, start = [], 0
    for number, rows in enumerate(counts):
        own = range(max(first, start) - start, min(last, start + rows) - start)
        if own:
            shares.append(Share(number, own.start, own.stop, rows))
        start += rows
    return shares


class StepBatches(NamedTuple):
    """A worker's part of the rows of one optimizer step of a lane."""

    batches: list[Batch]
    """One batch for each of the worker's shares, padded to the bucket of the micro-batch's longest row."""
    target_count: int
    """The number of targets of the step on all workers."""


class StepBatchLoader:
    """A loader of a worker's batches of optimizer steps.

    Args:
        rows: The training rows.
        sizes: The number of micro-batches of a step, and their mean number of rows.
        max_row_length: The largest padded length, as `compute_max_row_length` returns it.
        pad_token_id: The id of the padding token.
        rank: The rank of this worker in its trainer.
        world_size: The number of workers.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        sizes: BatchConfig,
        max_row_length: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        sampled = (rows[number] for number in range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))
        lengths = [bucket_length(len(row.ids), max_row_length) for row in sampled]
        self._row_counts = plan_row_counts(lengths, sizes)
        self.shares = assign_rows(self._row_counts, rank, world_size)
        self._rows, self._max_row_length, self._pad_token_id = rows, max_row_length, pad_token_id
        self._loaded: dict[tuple[int, int], StepBatches] = {}

    def load(self, steps: Sequence[tuple[int, int]]) -> list[StepBatches]:
        """Return the batches of steps, and keep them until the next call, which may ask for them again.

        Args:
            steps: The seed of each lane, and the number of steps that it has taken before this one.
        """
        self._loaded = {step: self._loaded.get(step) or self._make(*step) for step in set(steps)}
        return [self._loaded[step] for step in steps]

    def _make(self, seed: int, step: int) -> StepBatches:
        count = sum(self._row_counts)
        numbers = shuffled_indices(seed, len(self._rows), step * count, count)
        # The longest first: a step that does not fit the memory then fails in its first micro-batch.
        drawn = sorted((self._rows[number] for number in numbers), key=lambda row: -len(row.ids))
        starts = [0, *accumulate(self._row_counts)]
        batches = []
        for share in self.shares:
            start = starts[share.micro_batch]
            length = bucket_length(len(drawn[start].ids), self._max_row_length)
            own = drawn[start + share.first_row : start + share.last_row]
            batches.append(pad_rows(own, length, self._pad_token_id))
        return StepBatches(batches, sum(len(r.targets) - r.targets.count(IGNORE_INDEX) for r in drawn))
