"""Models with random weights, and lanes of the real training loop on random rows.

No stored weights, data, tokenizer or store is needed. This module imports `variants`, `orchestrator.finetune`
and `orchestrator.study` only, so it runs without Ray and MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.finetune.data.batches import Row
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Example, Task, TaskDefaults
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
)
from variants import catalogue
from variants.adapters import attach
from variants.api import Batching, VariantSettings

STEPS = 1562
"""Optimizer steps of a lane of the default study."""
FIRST_WORD = 2
"""The first token id that is neither padding nor the end."""


@dataclass(frozen=True)
class ModelShape:
    """An architecture of transformers and its sizes."""

    family: str
    """The prefix of the classes in transformers: <family>Config and <family>ForCausalLM."""
    sizes: Mapping[str, Any]
    """Arguments of the configuration class."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return int(self.sizes["vocab_size"])


def _shape(family: str, tied: bool, numbers: str, **more: int) -> ModelShape:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    values = dict(zip(names, map(int, numbers.split()), strict=True))
    return ModelShape(family, {"tie_word_embeddings": tied, **values, **more})


SHAPES = {
    "tiny": _shape("Qwen3", True, "512 32 64 2 2 1", head_dim=16),
    "letters": _shape("Llama", False, "25 96 192 3 4 4"),
    "smollm2-135m": _shape("Llama", True, "49152 576 1536 30 9 3"),
    "qwen3-0.6b": _shape("Qwen3", True, "151936 1024 3072 28 16 8", head_dim=128),
    "llama-3.1-8b": _shape("Llama", False, "128256 4096 14336 32 32 8"),
}
"""Name -> shape. `letters` is the base model of the task of that name."""


def build_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: int | None = None,
) -> Any:
    """Return a frozen language model with random weights, in eval mode.

    Args:
        name: A key of `SHAPES`.
        device: The device; `meta` for a model without values.
        dtype: The data type of the weights.
        layers: The number of decoder blocks; None for that of the shape.
    """
    import transformers

    shape = SHAPES[name]
    sizes = dict(shape.sizes)
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = getattr(transformers, f"{shape.family}Config")(**sizes)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{shape.family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class NumberTokenizer:
    """A tokenizer whose words are the numbers of the token ids."""

    pad_token_id, eos_token_id, all_special_ids = 0, 1, (0, 1)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Return the ids as text."""
        return " ".join(map(str, ids))

    def batch_decode(self, rows: Sequence[Any], **options: Any) -> list[str]:
        """Return each row of ids as text."""
        return [self.decode(list(map(int, row))) for row in rows]


class SyntheticTask(Task):
    """A generation task on random rows.

    Args:
        max_new_tokens: The largest length of an answer.
    """

    name, title, floor, default_model = "synthetic", "random tokens", 0.0, "none"
    output, grade_at = "generation", "last_evaluation"
    defaults = TaskDefaults(64, 8, 8, 10, 64, 512, 1, (1e-4,), dtype="bfloat16", accumulation=8)

    def __init__(self, max_new_tokens: int = 64) -> None:
        self.max_new_tokens = max_new_tokens  # type: ignore[misc]  # a class variable of other tasks

    def grade(self, example: Example, answer: str) -> float:
        """Return 0: the rows are random and have no right answer."""
        return 0.0


@dataclass(frozen=True)
class StepSize:
    """The size of an optimizer step of a lane."""

    rows: int
    """Rows of a micro-batch."""
    accumulation: int = 1
    max_length: int = 512
    """The longest row in tokens."""


def draw_rows(vocab_size: int, count: int, longest: int = 511) -> list[Row]:
    """Return random rows whose lengths are distributed like those of MetaMathQA.

    A prompt has about 113 tokens, an answer 137, a row 250. With a smaller `longest`, all lengths shrink.

    Args:
        vocab_size: The number of token ids.
        count: The number of rows.
        longest: The largest number of ids in a row.
    """
    generator, scale = np.random.default_rng(0), longest / 511
    prompts = 52 + np.clip(generator.lognormal(math.log(62) - 0.125, 0.5, count), 12, 300)
    answers = np.clip(generator.lognormal(math.log(138) - 0.15, 0.55, count), 10, 600)
    rows = []
    for prompt, answer in zip((prompts * scale).astype(int), (answers * scale).astype(int), strict=True):
        length = max(3, min(int(prompt + answer), longest))
        prompt_length = max(1, min(int(prompt), length - 1))
        ids = generator.integers(FIRST_WORD, vocab_size, length + 1).tolist()
        targets = (*[IGNORE_INDEX] * (prompt_length - 1), *ids[prompt_length:])
        rows.append(Row(tuple(ids[:-1]), targets, tuple(ids[:prompt_length])))
    return rows


def draw_equal_rows(vocab_size: int, count: int, length: int) -> list[Row]:
    """Return random rows of one length, all of whose tokens count in the loss.

    Args:
        vocab_size: The number of token ids.
        count: The number of rows.
        length: The number of ids in a row.
    """
    ids = np.random.default_rng(0).integers(FIRST_WORD, vocab_size, (count, length + 1)).tolist()
    return [Row(tuple(row[:-1]), tuple(row[1:]), tuple(row[: max(1, length // 2)])) for row in ids]


def make_configuration(
    variant: str, size: StepSize, seed: int = 0, learning_rate: float = 1e-4
) -> Configuration:
    """Return a configuration of a variant with rank 8.

    Args:
        variant: The name of the variant.
        size: The size of a step.
        seed: The seed.
        learning_rate: The learning rate.
    """
    rule = catalogue.get(variant)
    choice = VariantChoice(
        variant,
        8 if rule.uses_rank else 0,
        16.0 if rule.uses_alpha else None,
        extra=dict(rule.extra_defaults),
        numerics=rule.numerics,
    )
    return Configuration(
        choice,
        TaskChoice("synthetic", "0", 64, 8, 8, "exact_match", 0.0),
        ModelChoice("random", "0", "bfloat16"),
        OptimizerConfig(learning_rate),
        LRSchedule(STEPS),
        BatchConfig(size.rows, size.accumulation, size.max_length),
        evaluations=1,
        seed=seed,
    )


def make_lanes(
    model: Any, rows: Sequence[Row], variant: str, count: int, size: StepSize, same_seed: bool = False
) -> tuple[LaneGroup, list[Lane]]:
    """Attach a variant to a model and return a lane group with lanes of different rates.

    Args:
        model: The base model, on its device.
        rows: Training rows. The first 64 are the validation split, too.
        variant: The name of the variant. A variant that trains lanes only alone gets one lane.
        count: The number of lanes.
        size: The size of a step.
        same_seed: Whether all lanes read the same rows in each step, as lanes of one seed do in a study. If
            the lanes read rows of different lengths, a step needs more passes.
    """
    rule = catalogue.get(variant)
    choice = make_configuration(variant, size).variant
    settings = VariantSettings(choice.rank, choice.alpha, choice.dropout, choice.extra)
    adapters = attach(model, rule, settings)
    base_model = BaseModel(model, NumberTokenizer(), next(model.parameters()).device)
    held_out = [Example("", "") for _ in rows[:64]]
    split = EvaluationSplit(held_out, rows[:64], size.max_length - 1, base_model.processor)
    # The last argument, the untrained model's scores, is read by no benchmark.
    data = TaskData(SyntheticTask(), rows, {"validation": split}, {})  # type: ignore[arg-type]
    group = LaneGroup(base_model, adapters, data, SINGLE_PROCESS_GROUP)
    lanes = []
    for number in range(1 if rule.batching is Batching.EXCLUSIVE else count):
        rate = 1e-4 * (1 + number / 10)
        seed = 0 if same_seed else number
        lane = Lane(Lease(make_configuration(variant, size, seed, rate), 1))
        lane.initialize(adapters, 10.0, None)
        lanes.append(lane)
    return group, lanes


def take_step(group: LaneGroup, lanes: Sequence[Lane]) -> list[float]:
    """Take one optimizer step of all lanes, as the training loop does. Returns their losses."""
    results = group.reduce_gradients(lanes, *group.backward(lanes))
    for lane, result in zip(lanes, results, strict=True):
        lane.take_optimizer_step(result)
    return [result.loss for result in results]


def free_device_memory(device: torch.device) -> None:
    """Return unused memory of a GPU's allocator to the device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
