"""Batches of generated answers are as large as the memory of the device allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import WORDS_TASK, tiny_base_model
from three_lanes import three_lanes
from torch import Tensor
from transformers import Qwen3Config

from orchestrator.finetune.data.batches import bucket_length
from orchestrator.finetune.evaluation.cached_forward import CachedForward
from orchestrator.finetune.evaluation.evaluated_lanes import EvaluatedLanes
from orchestrator.finetune.evaluation.generate import generate_answers
from orchestrator.finetune.evaluation.generation_plan import (
    MAX_GPU_ROWS,
    MIN_ROWS,
    GenerationLimits,
    plan_generation_batches,
)
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import ModelChoice

GIB = 2**30
QWEN3_06B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
CACHED_BYTES = 28 * 2 * 8 * 128 * 2
"""Bytes of a token in the key-value cache of Qwen3-0.6B in bfloat16."""
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=300)


def limits_of(free_gib: float, device: str = "cuda", share: float = 1.0) -> GenerationLimits:
    return GenerationLimits.from_memory(QWEN3_06B, 2, int(free_gib * GIB), device, share)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 600))
def test_on_a_cpu_prompts_of_one_length_share_batches_of_near_equal_size(
    lengths: list[int], longest: int, max_new_tokens: int
) -> None:
    plan = plan_generation_batches(lengths, longest, max_new_tokens, limits_of(8, "cpu"))
    assert sorted(item for _, items in plan for item in items) == list(range(len(lengths)))
    sizes: dict[int, list[int]] = {}
    for length, items in plan:
        assert {bucket_length(lengths[item], longest) for item in items} == {length}
        sizes.setdefault(length, []).append(len(items))
    for length, counts in sizes.items():
        assert max(counts) <= min(64, max(8, 4096 // length), max(8, 32768 // (length + max_new_tokens)))
        assert max(counts) - min(counts) <= 1


@given(LENGTHS, st.integers(1, 600), st.floats(0.1, 80), st.integers(1, 4))
def test_on_a_gpu_a_batch_has_as_many_rows_as_fit(
    lengths: list[int], max_new_tokens: int, free_gib: float, workers: int
) -> None:
    limits = limits_of(free_gib)
    plan = plan_generation_batches(lengths, 300, max_new_tokens, limits, workers)
    assert sorted(item for _, items in plan for item in items) == list(range(len(lengths)))
    fair_share = max(MIN_ROWS, -(-len(lengths) // workers))
    for number, (length, items) in enumerate(plan):
        assert length == max(bucket_length(lengths[item], 300) for item in items)
        assert len(items) <= MAX_GPU_ROWS
        if len(items) > MIN_ROWS:
            assert len(items) * (length + max_new_tokens) * CACHED_BYTES <= free_gib * GIB / 2
        if number < len(plan) - 1:
            assert len(items) == min(fair_share, limits.rows(length, max_new_tokens))
    assert [length for length, _ in plan] == sorted((length for length, _ in plan), reverse=True)


def test_a_batch_that_runs_out_of_memory_is_generated_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    base_model, task = tiny_base_model(ModelChoice("tiny", "0" * 64)), tasks.get(WORDS_TASK)
    prompts = [(item, [4 + item % 8] * 20) for item in range(64)]
    rows, most = [], 64
    call = CachedForward._call

    def limited(self: CachedForward, ids: Tensor, *rest: Tensor) -> Tensor:
        rows.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, ids, *rest)

    monkeypatch.setattr(CachedForward, "_call", limited)
    with three_lanes(base_model) as adapters:
        lanes = EvaluatedLanes.of(adapters, ["y"], [0])

        def generate() -> list[list[tuple[str, ...]]]:
            rows.clear()
            return generate_answers(base_model, task, prompts, 20, lanes, SINGLE_PROCESS_GROUP)

        answers = generate()
        assert rows[0] == 64
        most = 32
        assert generate() == answers
        assert rows[:2] == [64, 32]
        assert base_model.generation.memory_share == 0.5
        assert generate() == answers
        assert max(rows) == 32, "later batches are planned for half of the memory"
