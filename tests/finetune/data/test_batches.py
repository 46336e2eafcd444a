"""Tokenized rows, their order in training, padding, and the batches of steps and of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.finetune.data.batches import (
    Batch,
    DeviceBatch,
    Row,
    StepBatches,
    StepBatchLoader,
    assign_rows,
    bucket_length,
    encode_examples,
    make_training_batch,
    pad_rows,
    plan_row_counts,
    shuffled_indices,
)
from orchestrator.finetune.evaluation.evaluate import plan_batches
from orchestrator.finetune.tasks.base import IGNORE_INDEX, EncodedExample, Example, Task
from orchestrator.study.configuration import BatchConfig
from orchestrator.util.errors import UsageError


class Characters(Task):
    """A task with one token per character, padding token 0 and end token 1."""

    name = "characters"

    def encode(self, example: Example, tokenizer: object) -> EncodedExample:
        prompt = tuple(ord(c) for c in example.prompt)
        answer = (*(ord(c) for c in example.answer), 1)
        return EncodedExample((*prompt, *answer), (*[IGNORE_INDEX] * len(prompt), *answer), len(prompt))


def row(length: int, label: int = 7) -> Row:
    return Row(tuple(range(2, 2 + length)), (*[IGNORE_INDEX] * (length - 1), label), (2,))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_holds_its_rows(length: int, cap: int) -> None:
    assert length <= bucket_length(length, cap) <= max(cap, length)


def test_targets_are_shifted_by_one_and_only_the_answer_counts_in_the_loss() -> None:
    (one,) = encode_examples([Example("ab", "cd")], Characters(), None)
    assert one.ids == (97, 98, 99, 100)
    assert one.targets == (IGNORE_INDEX, 99, 100, 1)
    assert one.prompt == (97, 98)


def test_training_truncates_examples_and_leaves_out_those_without_answer() -> None:
    rows = encode_examples([Example("ab", "cd"), Example("abcdef", "g")], Characters(), None, max_length=4)
    assert [(r.ids, r.targets) for r in rows] == [((97, 98, 99), (IGNORE_INDEX, 99, 100))]
    with pytest.raises(UsageError, match="max_length 2"):
        encode_examples([Example("ab", "cd")], Characters(), None, max_length=2)


class Words(Task):
    name = "words"


def llama(**begin: bool) -> Any:
    from transformers import LlamaTokenizer

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "▁b": 4, "a": 5, "b": 6, "▁": 7}
    return LlamaTokenizer(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], **begin)


def gemma(**begin: bool) -> Any:
    from transformers import GemmaTokenizer

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6, "▁": 7}
    return GemmaTokenizer(vocab=vocab, merges=[], **begin)


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("adds", [True, False])
def test_bos_precedes_the_prompt_if_the_tokenizer_adds_it(make: Callable[..., Any], adds: bool) -> None:
    words = make(add_bos_token=adds)
    assert words.bos_token_id is not None
    (row,) = encode_examples([Example("a b", "b a")], Words(), words)
    assert list(row.prompt) == words("a b")["input_ids"]
    assert row.ids[: len(row.prompt)] == row.prompt, "training and generation have the same prompt"
    assert (row.ids[0] == words.bos_token_id) is adds
    assert row.ids.count(words.bos_token_id) == int(adds), "BOS does not precede the answer"
    assert set(row.targets[: len(row.prompt) - 1]) == {IGNORE_INDEX}
    assert row.targets[-1] == words.eos_token_id


def test_an_appended_end_token_that_is_also_bos_does_not_precede_the_prompt() -> None:
    words = llama(add_bos_token=False, add_eos_token=True)
    words.bos_token = words.eos_token
    assert words("")["input_ids"] == words("a")["input_ids"][-1:] == [words.bos_token_id]
    (row,) = encode_examples([Example("a b", "b a")], Words(), words)
    assert words.bos_token_id not in row.ids


def test_without_a_bos_token_the_prompt_comes_first() -> None:
    from orchestrator.finetune.tasks.letters import tokenizer

    words = tokenizer()
    assert words.bos_token_id is None
    (row,) = encode_examples([Example("a b", "b")], Words(), words)
    assert list(row.prompt) == words("a b", add_special_tokens=False)["input_ids"]


def test_rows_are_padded_on_the_right() -> None:
    batch = pad_rows([row(2), row(3)], 4, pad_token_id=0)
    assert batch.ids.tolist() == [[2, 3, 0, 0], [2, 3, 4, 0]]
    assert batch.targets.tolist() == [
        [IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX],
    ]
    assert (batch.target_count, batch.length) == (2, 4)


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 100), st.integers(1, 60))
def test_the_order_consists_of_permutations_that_depend_only_on_the_seed(
    seed: int, size: int, start: int, count: int
) -> None:
    drawn = shuffled_indices(seed, size, 0, start + count)
    assert shuffled_indices(seed, size, start, count) == drawn[start:]
    for epoch in range((start + count) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_the_order_is_the_same_in_every_version() -> None:
    # Existing records were made with this order.
    assert shuffled_indices(0, 8, 0, 12) == [2, 6, 0, 4, 1, 3, 5, 7, 4, 0, 6, 1]
    assert shuffled_indices(1, 8, 0, 8) != shuffled_indices(0, 8, 0, 8)
    assert shuffled_indices(2**32, 8, 0, 8) != shuffled_indices(0, 8, 0, 8)


def test_a_micro_batch_is_padded_to_its_own_bucket() -> None:
    rows = [row(3), row(20), row(5), row(6)]
    batches = [
        make_training_batch(rows, seed=0, start=i, count=1, max_row_length=512, pad_token_id=0)
        for i in range(4)
    ]
    order = shuffled_indices(0, 4, 0, 4)
    assert [b.length for b in batches] == [bucket_length(len(rows[n].ids), 512) for n in order]
    both = make_training_batch(rows, seed=0, start=0, count=4, max_row_length=512, pad_token_id=0)
    assert both.ids.shape == (4, 24)
    assert torch.equal(both.ids[1, : batches[1].length], batches[1].ids[0])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(10, 400))
def test_a_scoring_plan_holds_every_item_once_in_near_equal_batches(lengths: list[int], cap: int) -> None:
    plan = plan_batches(lengths, cap)
    assert sorted(i for _, items in plan for i in items) == list(range(len(lengths)))
    sizes: dict[int, list[int]] = {}
    for length, items in plan:
        assert all(bucket_length(lengths[i], cap) == length for i in items)
        assert len(items) <= 64
        sizes.setdefault(length, []).append(len(items))
    assert all(max(s) - min(s) <= 1 for s in sizes.values())


# -- the micro-batches of a step ---------------------------------------------------------------------------

SIZES = st.builds(BatchConfig, st.integers(1, 6), st.integers(1, 6))


def numbered_row(number: int, length: int, targets: int = 1) -> Row:
    """Return a row whose first token is its number."""
    count = min(targets, length)
    ids = (number, *range(2, length + 1))
    return Row(ids, (*[IGNORE_INDEX] * (length - count), *[7] * count), (2,))


ROWS = [numbered_row(number, 1 + number * 37 % 90, 1 + number % 3) for number in range(50)]


def loader(sizes: BatchConfig, rank: int = 0, workers: int = 1) -> StepBatchLoader:
    return StepBatchLoader(ROWS, sizes, 96, 0, rank, workers)


def assert_equal(found: StepBatches, expected: StepBatches) -> None:
    assert found.target_count == expected.target_count
    for one, other in zip(found.batches, expected.batches, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.lengths, other.lengths)


@given(SIZES, st.integers(0, 40))
def test_a_step_has_the_rows_that_it_draws_the_longest_first(sizes: BatchConfig, step: int) -> None:
    (made,) = loader(sizes).load([(3, step)])
    count = sizes.batch_size * sizes.accumulation
    drawn = [ROWS[number] for number in shuffled_indices(3, len(ROWS), step * count, count)]
    lengths = [length for batch in made.batches for length in batch.lengths.tolist()]
    assert lengths == sorted((len(r.ids) for r in drawn), reverse=True)
    numbers = [number for batch in made.batches for number in batch.ids[:, 0].tolist()]
    stable = sorted(drawn, key=lambda r: -len(r.ids))
    assert numbers == [r.ids[0] for r in stable], "rows of equal length stay in the order of drawing"
    assert [b.length for b in made.batches] == [bucket_length(int(b.lengths[0]), 96) for b in made.batches]
    assert made.target_count == sum(batch.target_count for batch in made.batches)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 36))
def test_workers_share_a_step_and_whole_micro_batches_where_there_are_enough(
    counts: list[int], workers: int
) -> None:
    workers = min(workers, sum(counts))
    shares = [assign_rows(counts, rank, workers) for rank in range(workers)]
    computed = [
        (share.micro_batch, number)
        for of in shares
        for share in of
        for number in range(share.first_row, share.last_row)
    ]
    assert len(computed) == len(set(computed)) == sum(counts)
    assert all(share.row_count == counts[share.micro_batch] for of in shares for share in of)
    if workers <= len(counts):
        assert [s.micro_batch for s in shares[0]] == [*range(0, len(counts), workers)]
        assert all(s.first_row == 0 and s.last_row == s.row_count for of in shares for s in of)
    else:
        rows = [sum(share.last_row - share.first_row for share in of) for of in shares]
        assert max(rows) - min(rows) <= 1
        assert min(rows) >= 1


LENGTHS = st.lists(st.sampled_from([0, 8, 32, 64, 128, 512]), min_size=1, max_size=80)


@given(LENGTHS, SIZES)
def test_micro_batches_have_at_most_the_tokens_of_those_with_equal_numbers_of_rows(
    lengths: list[int], sizes: BatchConfig
) -> None:
    counts = plan_row_counts(lengths, sizes)
    size, count = sizes.batch_size, sizes.accumulation
    assert len(counts) == count
    assert sum(counts) == size * count
    assert min(counts) >= 1
    # The rows of a step with the lengths that are expected of them.
    total, ordered = size * count, sorted((max(1, length) for length in lengths), reverse=True)
    rows = [ordered[(2 * i + 1) * len(ordered) // (2 * total)] for i in range(total)]
    largest = max(n * rows[sum(counts[:index])] for index, n in enumerate(counts))
    assert largest <= max(size * rows[first] for first in range(0, total, size))
    if len(set(lengths)) == 1:
        assert set(counts) == {size}


@settings(max_examples=30)
@given(SIZES, st.integers(1, 6))
def test_the_parts_of_the_workers_are_the_step_of_one_worker(sizes: BatchConfig, workers: int) -> None:
    workers = min(workers, sizes.batch_size * sizes.accumulation)
    (whole,) = loader(sizes).load([(1, 2)])
    parts: dict[tuple[int, int], Batch] = {}
    for rank in range(workers):
        worker = loader(sizes, rank, workers)
        (part,) = worker.load([(1, 2)])
        assert part.target_count == whole.target_count
        for share, batch in zip(worker.shares, part.batches, strict=True):
            parts[share.micro_batch, share.first_row] = batch
    for number, batch in enumerate(whole.batches):
        joined = Batch.concatenate([parts[place] for place in sorted(parts) if place[0] == number])
        assert torch.equal(joined.ids, batch.ids)
        assert torch.equal(joined.targets, batch.targets)


STEPS = st.lists(st.tuples(st.sampled_from((0, 1)), st.integers(0, 5)))


@settings(max_examples=30)
@given(st.lists(STEPS, max_size=12))
def test_batches_do_not_depend_on_those_loaded_before(calls: list[list[tuple[int, int]]]) -> None:
    """The steps vary, as when lanes join, leave, resume or repeat a step."""
    sizes = BatchConfig(3, 2)
    one = loader(sizes)
    for steps in calls:
        for step, found in zip(steps, one.load(steps), strict=True):
            (expected,) = loader(sizes).load([step])
            assert_equal(found, expected)


def test_a_batch_on_the_device_has_the_targets_of_its_rows() -> None:
    first, second = pad_rows(ROWS[:3], 96, 0), pad_rows(ROWS[3:6], 96, 0)
    moved = DeviceBatch.copy_to(torch.device("cpu"), [first, second], [0.5, 0.25])
    joined = Batch.concatenate([first, second])
    has_label = joined.targets != IGNORE_INDEX
    assert torch.equal(moved.ids, joined.ids)
    assert torch.equal(moved.attention_mask, joined.attention_mask)
    assert torch.equal(moved.labels, joined.targets[has_label])
    assert torch.equal(joined.targets.flatten()[moved.target_positions], moved.labels)
    assert moved.lane_target_counts == (first.target_count, second.target_count)
    weights = [0.5] * first.target_count + [0.25] * second.target_count
    assert moved.weights.tolist() == weights
    assert moved.first_target_column == int(has_label.any(0).nonzero()[0])
    alone = DeviceBatch.copy_to(torch.device("cpu"), [first])
    assert float(alone.weights.sum()) == pytest.approx(1.0)
