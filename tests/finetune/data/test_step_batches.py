"""The micro-batches of a step: sorted rows, the shares of workers, and batches that are made ahead."""

from __future__ import annotations

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
    pad_rows,
    plan_row_counts,
    shuffled_indices,
)
from orchestrator.finetune.tasks.base import IGNORE_INDEX
from orchestrator.study.configuration import BatchConfig

SIZES = st.builds(BatchConfig, st.integers(1, 6), st.integers(1, 6))


def row(number: int, length: int, targets: int = 1) -> Row:
    """Return a row whose first token is its number."""
    count = min(targets, length)
    ids = (number, *range(2, length + 1))
    return Row(ids, (*[IGNORE_INDEX] * (length - count), *[7] * count), (2,))


ROWS = [row(number, 1 + number * 37 % 90, 1 + number % 3) for number in range(50)]


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
