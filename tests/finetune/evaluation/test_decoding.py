"""Decoding gives the tokens of transformers' `generate`, and rows that have ended leave the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from three_lanes import NAMES, three_lanes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    StoppingCriteria,
    StoppingCriteriaList,
)

from orchestrator.finetune.evaluation import generate
from orchestrator.finetune.evaluation.generate import (
    CachedForward,
    decode_answers,
    draw_uniform_table,
    sample_tokens,
)
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.letters import VOCABULARY, tokenizer

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index("<eos>"),
    "pad_token_id": VOCABULARY.index("<pad>"),
}
SLIDING = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=9, layer_types=SLIDING),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=SLIDING),
    "gpt2": GPT2Config(**SIZES, n_positions=128),
}
ROWS, LENGTH, SEEDS = 20, 12, (0, 1, 2)


class Sampled(Task):
    """A task whose answers are sampled from a nucleus."""

    max_new_tokens, temperature, top_p = 70, 1.5, 0.95


TASK = Sampled()


@cache
def make_base_model(family: str) -> BaseModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
    model = model.eval().requires_grad_(False)
    return BaseModel(model, tokenizer(), torch.device("cpu"))


def make_prompts(lanes: int = len(NAMES)) -> tuple[Tensor, Tensor]:
    """Return the padded prompts and their mask, equal for all lanes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, len(VOCABULARY), (ROWS, LENGTH), generator=generator)
    padding = torch.randint(0, LENGTH - 1, (ROWS,), generator=generator)
    mask = (torch.arange(LENGTH) >= padding[:, None]).long()
    ids = torch.where(mask == 1, ids, VOCABULARY.index("<pad>"))
    return ids.repeat(lanes, 1), mask.repeat(lanes, 1)


def make_uniforms(seeds: Sequence[int] = SEEDS) -> Tensor:
    return draw_uniform_table(seeds, [(row, 0) for row in range(ROWS)], TASK.max_new_tokens)


class Sampler(LogitsProcessor):
    """A logits processor that leaves only the sampled token of each row, for greedy decoding to select."""

    def __init__(self, uniforms: Tensor, task: Task) -> None:
        self.uniforms, self.task = uniforms, task

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = self.uniforms[:, input_ids.shape[1] - LENGTH]
        tokens = sample_tokens(scores, numbers, self.task.temperature, self.task.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class StopStrings(StoppingCriteria):
    """A stopping criterion that ends the rows that have a stop string, at every eighth token."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        answers = input_ids[:, LENGTH:]
        if answers.shape[1] % generate.STOP_CHECK_INTERVAL:
            return torch.zeros(len(answers), dtype=torch.bool)
        texts = tokenizer().batch_decode(answers, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts])


def generate_with_transformers(
    base_model: BaseModel, task: Task, ids: Tensor, mask: Tensor, uniforms: Tensor | None
) -> Tensor:
    model, pad = base_model.model, base_model.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        max_new_tokens=task.max_new_tokens, eos_token_id=base_model.tokenizer.eos_token_id, pad_token_id=pad
    )
    answers: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([] if uniforms is None else [Sampler(uniforms, task)]),
        stopping_criteria=StoppingCriteriaList([StopStrings(task.stop)] if task.stop else []),
    )[:, LENGTH:]
    return torch.nn.functional.pad(answers, (0, task.max_new_tokens - answers.shape[1]), value=pad)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every forward pass appends its number of rows."""
    rows: list[int] = []
    append = CachedForward.append

    def counting(self: CachedForward, tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        return append(self, tokens)

    monkeypatch.setattr(CachedForward, "append", counting)
    return rows


STOP_TEXTS = ("a b", "e d")


def combinations() -> list[Any]:
    """Return all combinations; the default run has one for each family, which differ."""
    found = []
    for number, family in enumerate(CONFIGS):
        chosen = (bool(number & 2), number in (0, 3))
        for sampled, stops in itertools.product((False, True), repeat=2):
            case = pytest.param(
                family, sampled, STOP_TEXTS if stops else (),
                id="-".join((family, "sampled" if sampled else "greedy", "stop" if stops else "eos")),
                marks=() if (sampled, stops) == chosen else pytest.mark.slow,
            )  # fmt: skip
            found.append(case)
    return found


@pytest.mark.parametrize(("family", "sampled", "stop"), combinations())
def test_the_tokens_equal_those_of_transformers(
    family: str, sampled: bool, stop: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base_model, task = make_base_model(family), Sampled()
    task.stop = stop
    ids, mask = make_prompts()
    uniforms = make_uniforms() if sampled else None
    with three_lanes(base_model) as adapters, adapters.activate_lanes(NAMES, None):
        expected = generate_with_transformers(base_model, task, ids, mask, uniforms)
        rows = count_rows(monkeypatch)
        found = decode_answers(base_model, task, ids, mask, len(NAMES), uniforms)
    assert torch.equal(found, expected)
    if sampled:
        assert rows[0] == len(ids) > rows[-1]  # rows have left


def test_a_lanes_tokens_do_not_depend_on_the_lanes_beside_it() -> None:
    """Beside other lanes, rows leave later, since each lane keeps as many rows as the lane with the most."""
    base_model = make_base_model("llama")
    with three_lanes(base_model) as adapters:
        with adapters.activate_lanes(NAMES, None):
            together = decode_answers(base_model, TASK, *make_prompts(), len(NAMES), make_uniforms())
        for name, seed, expected in zip(NAMES, SEEDS, together.chunk(len(NAMES)), strict=True):
            with adapters.activate_lanes([name], None):
                alone = decode_answers(base_model, TASK, *make_prompts(1), 1, make_uniforms([seed]))
            assert torch.equal(alone, expected)
