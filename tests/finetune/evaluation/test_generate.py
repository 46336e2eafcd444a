"""Generated answers: how they are sampled, where they end, and the batches in which they are made.

`test_task_heads.py` checks that two workers sample the same answers as one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import WORDS_TASK, tiny_base_model
from scripted import configuration as configured
from test_evaluate import split_of
from three_lanes import NAMES, three_lanes
from torch import Tensor

from orchestrator.finetune.data.batches import bucket_length
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.evaluation import generate
from orchestrator.finetune.evaluation.evaluate import evaluate
from orchestrator.finetune.evaluation.generate import (
    GPU_LIMITS,
    MIN_ROWS,
    CachedForward,
    EvaluatedLanes,
    count_rows,
    draw_uniforms,
    generate_answers,
    plan_generation_batches,
    sample_tokens,
    truncate_at_stop,
)
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice

SEEDS = (0, 1, 2)


def make_base_model() -> BaseModel:
    return tiny_base_model(ModelChoice("tiny", "0" * 64, "float32"))


def sampled(
    samples: int = 3, temperature: float = 1.0, top_p: float = 1.0, stop: tuple[str, ...] = ()
) -> Task:
    task = type(tasks.get(WORDS_TASK))()
    task.samples, task.temperature, task.top_p, task.stop = samples, temperature, top_p, stop  # type: ignore[misc]
    return task


def test_token_frequencies_equal_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, -30.0])
    count = 20_000
    numbers = torch.from_numpy(draw_uniforms(7, 0, 0, count))
    for temperature in (1.0, 0.5):
        tokens = sample_tokens(logits.repeat(count, 1), numbers, temperature)
        expected = torch.softmax(logits / temperature, dim=0)
        found = torch.bincount(tokens, minlength=5) / count
        # Within five standard errors; a token with almost no probability is not sampled.
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


def test_a_nucleus_excludes_the_tail_and_keeps_proportions() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    count = 20_000
    tokens = sample_tokens(
        logits.repeat(count, 1), torch.from_numpy(draw_uniforms(1, 0, 0, count)), 1.0, top_p=0.7
    )
    # The probabilities 0.5 and 0.25 together reach 0.7.
    assert sorted(set(tokens.tolist())) == [1, 3]
    assert (tokens == 1).float().mean().item() == pytest.approx(2 / 3, abs=0.02)
    one = sample_tokens(logits.repeat(50, 1), torch.from_numpy(draw_uniforms(1, 0, 0, 50)), 1.0, top_p=0.4)
    assert set(one.tolist()) == {1}


def test_uniforms_differ_by_seed_item_and_sample() -> None:
    found = {tuple(draw_uniforms(s, i, k, 4)) for s in (0, 1, 2**40) for i in range(3) for k in range(3)}
    assert len(found) == 27


def test_samples_do_not_depend_on_the_lane_group() -> None:
    base_model, task = make_base_model(), sampled()
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters:
        together = evaluate(base_model, task, split, EvaluatedLanes(adapters, NAMES, SEEDS))
        for name, seed, one in zip(NAMES, SEEDS, together, strict=True):
            alone = evaluate(base_model, task, split, EvaluatedLanes(adapters, [name], [seed]))
            assert alone == [one]
        # With the second lane's seed, the first lane's answers differ from the answers of both lanes.
        other = evaluate(base_model, task, split, EvaluatedLanes(adapters, [NAMES[0]], [1]))[0]
    assert other.items.answers != together[0].items.answers
    assert other.items.answers != together[1].items.answers


def test_samples_do_not_depend_on_the_order_or_on_other_prompts() -> None:
    base_model, task = make_base_model(), sampled()
    split = split_of(task, base_model)
    prompts = [(number, row.prompt) for number, row in enumerate(split.rows)]
    with three_lanes(base_model) as adapters:

        def answers_to(some_prompts: list[tuple[int, tuple[int, ...]]]) -> dict[int, tuple[str, ...]]:
            generated = generate_answers(
                base_model,
                task,
                some_prompts,
                split.max_row_length,
                EvaluatedLanes(adapters, ["x"], [5]),
                SINGLE_PROCESS_GROUP,
            )
            return {number: texts for (number, _), texts in zip(some_prompts, generated[0], strict=True)}

        whole = answers_to(prompts)
        assert answers_to(prompts[::-1]) == whole
        some = answers_to(prompts[3:20])
    assert some == {number: whole[number] for number in some}
    assert all(len(texts) == 3 for texts in whole.values())
    assert any(len(set(texts)) > 1 for texts in whole.values())


def test_a_score_is_the_mean_grade_of_the_samples() -> None:
    base_model, task = make_base_model(), sampled(samples=4, temperature=2.0)
    split = split_of(task, base_model)
    with three_lanes(base_model) as adapters:
        lanes = EvaluatedLanes(adapters, ["y"], [3])
        found = evaluate(base_model, task, split, lanes)[0]
        prompts = [(number, row.prompt) for number, row in enumerate(split.rows)]
        generated = generate_answers(
            base_model, task, prompts, split.max_row_length, lanes, SINGLE_PROCESS_GROUP
        )[0]
    grades = [
        sum(task.grade(example, text) for text in texts) / 4
        for example, texts in zip(split.examples, generated, strict=True)
    ]
    assert list(found.items.correct) == grades
    assert found.scores["exact_match"] == pytest.approx(sum(grades) / len(grades))
    assert found.items.answers == tuple(texts[0] for texts in generated)


def test_samples_at_temperature_zero_equal_the_greedy_answer() -> None:
    base_model = make_base_model()
    split = split_of(sampled(), base_model)
    with three_lanes(base_model) as adapters:
        lanes = EvaluatedLanes(adapters, NAMES, SEEDS)
        cold = evaluate(base_model, sampled(samples=1, temperature=1e-6), split, lanes)
        greedy = evaluate(base_model, sampled(samples=1, temperature=0.0), split, lanes)
    assert cold == greedy


def test_an_answer_ends_before_its_first_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    assert truncate_at_stop("a b### c", ("###", " b")) == "a"
    assert truncate_at_stop("a b", ()) == "a b"
    base_model = make_base_model()
    plain = sampled(temperature=3.0)
    split = split_of(plain, base_model)
    monkeypatch.setattr(generate, "STOP_CHECK_INTERVAL", 2)
    with three_lanes(base_model) as adapters:
        prompts = [(number, row.prompt) for number, row in enumerate(split.rows)]
        lanes = EvaluatedLanes(adapters, ["x"], [0])
        whole = generate_answers(
            base_model, plain, prompts, split.max_row_length, lanes, SINGLE_PROCESS_GROUP
        )[0]
        stops = ("a", "c d")
        stopped = generate_answers(
            base_model,
            sampled(temperature=3.0, stop=stops),
            prompts,
            split.max_row_length,
            lanes,
            SINGLE_PROCESS_GROUP,
        )[0]
    assert stopped == [tuple(truncate_at_stop(text, stops) for text in texts) for texts in whole]
    assert stopped != whole


def test_answers_may_be_graded_at_the_last_evaluation_only() -> None:
    base_model, task = make_base_model(), sampled()
    task.grade_at = "last_evaluation"  # type: ignore[misc]
    split = split_of(task, base_model)

    class Lane:
        def __init__(self, name: str, seed: int, at_end: bool) -> None:
            self.fingerprint, self.is_at_last_step, self.configuration = name, at_end, configured(seed=seed)

    lanes = [Lane(name, seed, name == "y") for name, seed in zip(NAMES, SEEDS, strict=True)]
    with three_lanes(base_model) as adapters:
        group = LaneGroup(base_model, adapters, TaskData(task, (), {"test": split}, {}), SINGLE_PROCESS_GROUP)
        found = dict(zip(NAMES, group.evaluate(lanes, "test"), strict=True))  # type: ignore[arg-type]
        task.grade_at = "every_evaluation"  # type: ignore[misc]
        every = dict(zip(NAMES, group.evaluate(lanes, "test"), strict=True))  # type: ignore[arg-type]
    assert {name for name in NAMES if task.metric in found[name].scores} == {"y"}
    assert found["y"] == every["y"]
    for name in NAMES:
        assert found[name].scores["loss"] == every[name].scores["loss"]
        assert len(every[name].items.answers) == len(split.rows)


# -- batches -------------------------------------------------------------------------------------------------

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
            assert len(items) == min(fair_share, count_rows(GPU_LIMITS, length, max_new_tokens))
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

        def answer() -> list[list[tuple[str, ...]]]:
            rows.clear()
            return generate_answers(base_model, task, prompts, 20, lanes, SINGLE_PROCESS_GROUP)

        answers = answer()
        assert rows[0] == 64
        most = 32
        assert answer() == answers
        assert rows[:2] == [64, 32]
        assert answer() == answers
        assert max(rows) == 32, "later batches begin with the number that fits"
