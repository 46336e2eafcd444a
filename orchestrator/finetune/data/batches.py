"""Examples as tensors: encoded once (`prepared.py` keeps the rows on disk), drawn in an order that the seed
alone decides, padded to buckets.

Here, and nowhere else, labels are shifted: `targets[i]` is what the model has to say after reading `ids[i]`.
A task with a head has one target a row, what the head has to say of the whole text; it stands at the last
token. An image has no ids: its length is 0, and its file is decoded when its batch is computed (`images.py`).

Training and scoring pad on the right. In a causal model no real token looks at what comes after it, and
padding carries no loss, so it needs no attention mask (`forward.py` says what other models get).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.tasks.base import IGNORE_INDEX, EncodedExample, Example, Image, Task
from orchestrator.util.errors import UsageError, format_error, quote_value

TOKENIZER_BATCH_SIZE = 1024
"""Examples that a tokenizer is given at once."""


@dataclass(frozen=True)
class Row:
    """One example. `ids` and `targets` are of one length; for an answer of tokens `ids` lack the last one and
    `targets` are one further. `second`: as of Encoded. Of an image: no ids, and one target. A new field needs
    its column in `prepared.py`."""

    ids: tuple[int, ...]
    targets: tuple[float, ...]
    prompt: tuple[int, ...]
    second: int | None = None
    image: Image | None = None


@dataclass(frozen=True)
class Batch:
    """`ids` and `targets` (rows, length), `lengths` (rows,) without padding; all on the CPU. int64, but
    float64 targets where they are values. `seconds` (rows,): where a row's second text begins (its length,
    where it has none); None when no row has one. `images`: one a row, for a task of images; `ids` are
    (rows, 0) then, and `targets` (rows, 1)."""

    ids: Tensor
    targets: Tensor
    lengths: Tensor
    second_segment_starts: Tensor | None = None
    images: tuple[Image, ...] = ()

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of batches of one length, one batch after another."""
        has_pairs = any(b.second_segment_starts is not None for b in batches)
        return cls(
            torch.cat([b.ids for b in batches]),
            torch.cat([b.targets for b in batches]),
            torch.cat([b.lengths for b in batches]),
            torch.cat(
                [b.lengths if b.second_segment_starts is None else b.second_segment_starts for b in batches]
            )
            if has_pairs
            else None,
            tuple(image for b in batches for image in b.images),
        )

    def slice_rows(self, first: int, last: int) -> Batch:
        """Rows `first` .. `last - 1`, as long as they are here."""
        return Batch(
            self.ids[first:last],
            self.targets[first:last],
            self.lengths[first:last],
            None if self.second_segment_starts is None else self.second_segment_starts[first:last],
            self.images[first:last],
        )

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def target_counts(self) -> tuple[int, ...]:
        """Targets with loss, a row."""
        return tuple((self.targets != IGNORE_INDEX).sum(dim=1).tolist())

    @property
    def target_count(self) -> int:
        """Targets with loss in all."""
        return sum(self.target_counts)

    @property
    def attention_mask(self) -> Tensor:
        """(rows, length) bool: False at padding. Of images (rows, 0): they have none."""
        return torch.arange(self.length) < self.lengths.unsqueeze(1)

    @property
    def token_type_ids(self) -> Tensor | None:
        """(rows, length) int64: 1 at the second text, 0 at the first and at padding; None without pairs."""
        if self.second_segment_starts is None:
            return None
        return (
            self.attention_mask & (torch.arange(self.length) >= self.second_segment_starts.unsqueeze(1))
        ).long()


def bucket_length(length: int, max_row_length: int) -> int:
    """The length that `length` is padded to: 8, 16, 24, 32, 48, 64, 96, ... (2^k and 1.5 * 2^k), no more than
    `cap` unless `length` itself is longer. 0, of images, stays 0."""
    if length == 0:
        return 0
    size = 8
    for size in _sizes():
        if size >= length:
            break
    return min(size, max(max_row_length, length))


def _sizes() -> Iterator[int]:
    yield 8
    size = 16
    while True:
        yield from (size, size + size // 2)
        size *= 2


def compute_max_row_length(task: Task, max_length: int) -> int:
    """The most ids that a training row has: `cap` of the functions here."""
    return max_length if task.has_head else max_length - 1


def encode_examples(
    examples: Sequence[Example], task: Task, processor: Any, max_length: int | None = None
) -> list[Row]:
    """All rows of `rows_of`, at hand."""
    return list(iter_encoded_examples(examples, task, processor, max_length))


def iter_encoded_examples(
    examples: Sequence[Example],
    task: Task,
    processor: Any,
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Row]:
    """`processor`: the model's tokenizer, of no use for images. With `max_length` (training) longer examples
    lose their end, and those whose answer goes with it are left out. Without it (evaluation) all are kept
    whole. For a task with a head it is always given: of a longer text the model sees the last token, which
    closes it, and what fits before; of a longer pair what `Task.encode_cut` leaves. Raises BadInput when
    nothing is left to learn, or when an example has nothing to score or to read. `progress` is told how many
    examples are done, now and then."""
    if task.inputs == "image":
        yield from (to_image_row(example, task, number) for number, example in enumerate(examples))
        return
    is_empty = True
    for start in range(0, len(examples), TOKENIZER_BATCH_SIZE):
        block = examples[start : start + TOKENIZER_BATCH_SIZE]
        for number, (example, encoded) in enumerate(
            zip(block, _encode_block(block, task, processor, start), strict=True), start
        ):
            if _has_empty_input(encoded, example, task, held_out=max_length is None):
                raise UsageError(
                    f"Task {task.name!r}: the prompt of example {number} is empty: the model's tokenizer "
                    "makes no token of it."
                )
            is_too_long = max_length is not None and len(encoded.ids) > max_length
            if is_too_long and task.has_head and example.pair is not None:
                assert max_length is not None
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


def _encode_block(
    examples: Sequence[Example], task: Task, processor: Any, first_index: int
) -> list[EncodedExample]:
    """Return what the task's `encode_all` gives for the examples from number `start` on.

    Raises:
        BadInput: An example cannot be encoded, for instance by a word-level tokenizer that has no token for
            unknown words, or because a user's `encode` raises or ends the process. The error names the
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
                    f"Task {task.name!r}: {format_error(one)}, where example {number}, {text}, is encoded; correct "
                    "the task or the example, or take a --model whose tokenizer knows its words."
                ) from one
        if isinstance(error, SystemExit):
            raise UsageError(
                f"Task {task.name!r}: {format_error(error)}, where its examples are encoded."
            ) from error
        raise error


def to_image_row(example: Example, task: Task, number: int) -> Row:
    """Raises BadInput for an example without an image."""
    if example.image is None:
        raise UsageError(f"Task {task.name!r} is one of images: example {number} has none.")
    return Row((), (task.target(example),), (), image=example.image)


def _has_empty_input(encoded: EncodedExample, example: Example, task: Task, held_out: bool) -> bool:
    """Whether there is nothing for a head to read, or for an answer to begin from."""
    if task.has_head:
        return not encoded.ids
    generated = held_out and task.output == "generation" and example.counts_in != "loss"
    return generated and encoded.prompt_length == 0


def _to_row(example: Example, encoded: EncodedExample, task: Task, max_length: int | None) -> Row | None:
    """None: nothing of its answer is left."""
    if task.has_head:
        ids = encoded.ids
        if max_length is not None and len(ids) > max_length:
            ids = (*ids[: max_length - 1], ids[-1])
        return Row(
            ids, (*[IGNORE_INDEX] * (len(ids) - 1), task.target(example)), ids, encoded.second_segment_start
        )
    ids, labels = encoded.ids[:max_length], encoded.labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return None
    return Row(ids[:-1], labels[1:], encoded.ids[: encoded.prompt_length])


def pad_rows(rows: Sequence[Row], length: int, pad_token_id: int) -> Batch:
    """Rows to one length, padded on the right."""
    ids = torch.tensor([[*r.ids, *[pad_token_id] * (length - len(r.ids))] for r in rows], dtype=torch.int64)
    values = any(isinstance(r.targets[-1], float) for r in rows)
    targets = torch.tensor(
        [[*r.targets, *[IGNORE_INDEX] * (length - len(r.targets))] for r in rows],
        dtype=torch.float64 if values else torch.int64,
    )
    lengths = [len(r.ids) for r in rows]
    segment_starts = [
        length if r.second is None else r.second for r, length in zip(rows, lengths, strict=True)
    ]
    second_segment_starts = torch.tensor(segment_starts) if segment_starts != lengths else None
    images = tuple(r.image for r in rows if r.image is not None)
    return Batch(ids, targets, torch.tensor(lengths), second_segment_starts, images)


def make_training_batch(
    rows: Sequence[Row], seed: int, start: int, count: int, max_row_length: int, pad_token_id: int
) -> Batch:
    """Examples `start` .. `start + count - 1` of the seed's endless sequence, padded to their own bucket."""
    drawn = [rows[number] for number in shuffled_indices(seed, len(rows), start, count)]
    return pad_rows(drawn, bucket_length(max(len(r.ids) for r in drawn), max_row_length), pad_token_id)


def shuffled_indices(seed: int, size: int, start: int, count: int) -> list[int]:
    """A piece of the endless sequence of example numbers: one permutation of `size` after another."""
    return [
        int(_permutation(seed, size, index // size)[index % size]) for index in range(start, start + count)
    ]


@lru_cache(maxsize=64)
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises that its streams never change; torch does not.
    return np.random.RandomState([seed % 2**32, seed // 2**32, epoch]).permutation(size)


def plan_batches(
    lengths: Sequence[int],
    max_row_length: int,
    max_rows: int = 64,
    max_tokens: int = 4096,
    max_new_tokens: int = 0,
) -> list[tuple[int, list[int]]]:
    """How a split is scored: (padded length, item numbers) a batch. Items of one bucket go together, at most
    `rows` and about `tokens` tokens, in batches of nearly equal size (a small last one would take another
    kernel, with other last bits). Nothing in it depends on how many lanes are scored at once. `growth`: the
    tokens that each will write; with them a batch has about eight times `tokens`, which are only kept."""
    by_bucket: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        by_bucket.setdefault(bucket_length(length, max_row_length), []).append(item)
    plan = []
    for length, items in sorted(by_bucket.items()):
        batch_size = min(
            max_rows,
            max(8, max_tokens // max(1, length)),
            max(8, 8 * max_tokens // max(1, length + max_new_tokens)),
        )
        batch_count = -(-len(items) // batch_size)
        plan += [(length, part.tolist()) for part in np.array_split(items, batch_count)]
    return plan
