"""Helpers that run a task of the hub end to end, with a data folder of the hub's schema and a small model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import Script, leases, train

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    VariantChoice,
)
from variants import catalogue as variants

Rows = Sequence[Mapping[str, Any]]
STEPS = 10


def write(root: Path, repository: str, splits: Mapping[str, Rows], subset: str | None = None) -> Path:
    """Write a dataset in the hub's layout, one Parquet file per split. Each subset needs its own call."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    folder = root / repository
    place = folder / (subset or "data")
    place.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        Dataset.from_list([dict(row) for row in rows]).to_parquet(place / f"{split}-00000-of-00001.parquet")
    if subset is not None:
        card = folder / "README.md"
        if card.exists() and f"config_name: {subset}\n" in card.read_text():
            return folder
        head = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
        files = "".join(f"  - split: {s}\n    path: {subset}/{s}-*.parquet\n" for s in splits)
        card.write_text(f"{head}- config_name: {subset}\n  data_files:\n{files}---\n")
    return folder


def tokenizer() -> Any:
    """Return a tokenizer with one token per byte, which can encode every text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def llama(folder: Path) -> Path:
    """Save a Llama of two layers with hidden size 32 and the same random weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    with torch.random.fork_rng(devices=[]), suppress_transformers_logging():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                bos_token_id=None,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def small(task: Task, monkeypatch: pytest.MonkeyPatch, train: int, validation: int, test: int) -> None:
    """Reduce the task's default sizes to the number of rows in the folder, which has fewer than the hub."""
    sizes = {"train_size": train, "validation_size": validation, "test_size": test}
    monkeypatch.setattr(task, "defaults", replace(task.defaults, **sizes))


def configuration(task: Task, model: Path, bases: Path, seed: int = 0, **changes: Any) -> Configuration:
    """Return a configuration: LoRA of rank 4 on the model in a folder, `STEPS` steps, two evaluations."""
    content = model_catalogue.prepare_base_model(str(model), bases)
    made = Configuration(
        VariantChoice("lora", rank=4, alpha=8.0, numerics=variants.get("lora").numerics),
        task.choice(),
        ModelChoice(str(model), content, "float32"),
        OptimizerConfig(1e-2, weight_decay=task.defaults.weight_decay),
        LRSchedule(STEPS, task.defaults.schedule),
        BatchConfig(4, 1, task.defaults.max_length),
        evaluations=2,
        seed=seed,
    )
    return replace(made, **changes)


def through_the_loop(
    task: Task,
    data: Path,
    model: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> list[Record]:
    """Train one lane per seed in one lane group, and return their records."""
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(data))
    store = Store(work / "store")
    made = [configuration(task, model, store.bases, seed) for seed in seeds]
    load = partial(loading.load_base_model, root=store.bases, device="cpu")
    train(
        Script(leases(made)), store, load_base_model=lambda choice, task: load(choice, task=task), **options
    )
    records = [store.get(one.fingerprint) for one in made]
    assert all(records), records
    return [record for record in records if record is not None]


def assert_went_through(record: Record, task: Task, graded: Mapping[str, int] | None = None) -> None:
    """Assert that a lane was trained to its end and scored on both splits, with an outcome per graded item.

    Args:
        record: The record of the lane.
        task: The task.
        graded: The number of items of each split that count in the metric. Default: all items.
    """
    assert record.state == "finished", record.reason
    assert record.steps == len(record.curve) == STEPS
    assert record.curve[-1].loss < record.curve[0].loss
    sizes = {"validation": task.defaults.validation_size, "test": task.defaults.test_size}
    for split, size in (graded or sizes).items():
        score = record.score(split)  # type: ignore[arg-type]
        assert score is not None
        assert 0.0 <= score <= 1.0
        assert len(record.items[split].correct) == size
        assert task.metric in record.baseline_scores[split]
