"""The batches of generated answers, and their halves where memory runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import WORDS_TASK, tiny_base_model
from three_lanes import three_lanes
from torch import Tensor

from orchestrator.finetune.data.batches import bucket_length
from orchestrator.finetune.evaluation.generate import (
    GPU_LIMITS,
    MIN_ROWS,
    CachedForward,
    EvaluatedLanes,
    generate_answers,
    plan_generation_batches,
)
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import ModelChoice

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=300)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 600))
def test_on_a_cpu_prompts_of_one_length_share_batches_of_near_equal_size(
    lengths: list[int], longest: int, max_new_tokens: int
) -> None:
    plan = plan_generation_batches(lengths, longest, max_new_tokens, on_gpu=False)
    assert sorted(item for _, items in plan for item in items) == list(range(len(lengths)))
    sizes: dict[int, list[int]] = {}
    for length, items in plan:
        assert {bucket_length(lengths[item], longest) for item in items} == {length}
        sizes.setdefault(length, []).append(len(items))
    for length, counts in sizes.items():
        assert max(counts) <= min(64, max(8, 4096 // length), max(8, 32768 // (length + max_new_tokens)))
        assert max(counts) - min(counts) <= 1


@given(LENGTHS, st.integers(1, 600), st.integers(1, 4))
def test_on_a_gpu_prompts_of_several_lengths_share_a_batch(
    lengths: list[int], max_new_tokens: int, workers: int
) -> None:
    plan = plan_generation_batches(lengths, 300, max_new_tokens, True, workers)
    assert sorted(item for _, items in plan for item in items) == list(range(len(lengths)))
    fair_share = max(MIN_ROWS, -(-len(lengths) // workers))
    for number, (length, items) in enumerate(plan):
        assert length == max(bucket_length(lengths[item], 300) for item in items)
        if number < len(plan) - 1:
            assert len(items) == min(fair_share, GPU_LIMITS.max_rows(length, max_new_tokens))
    assert [length for length, _ in plan] == sorted((length for length, _ in plan), reverse=True)


def test_a_batch_that_runs_out_of_memory_is_generated_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    base_model, task = tiny_base_model(ModelChoice("tiny", "0" * 64)), tasks.get(WORDS_TASK)
    prompts = [(item, [4 + item % 8] * 20) for item in range(64)]
    rows, most = [], 64
    append = CachedForward.append

    def limited(self: CachedForward, tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return append(self, tokens)

    monkeypatch.setattr(CachedForward, "append", limited)
    with three_lanes(base_model) as adapters:
        lanes = EvaluatedLanes(adapters, ["y"], [0])

        def generate() -> list[list[tuple[str, ...]]]:
            rows.clear()
            return generate_answers(base_model, task, prompts, 20, lanes, SINGLE_PROCESS_GROUP)

        answers = generate()
        assert rows[0] == 64
        most = 32
        assert generate() == answers
        assert rows[:2] == [64, 32]
        assert generate() == answers
        assert max(rows) == 32, "later batches begin with the number that fits"
