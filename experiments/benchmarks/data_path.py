"""Measure the time to tokenize many short examples, and the memory of a worker that reads them.

    python experiments/benchmarks/data_path.py --examples 100000

The texts are synthetic and the tokenizer splits at words, so nothing is downloaded. The script
deletes its files at the end.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.data.batches import TOKENIZER_BATCH_SIZE, encode_examples, make_training_batch
from orchestrator.finetune.tasks.base import Example, Task, TaskDefaults
from orchestrator.finetune.tasks.pretraining import word_tokenizer
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    VariantChoice,
)

WORDS = [f"w{number}" for number in range(1000)]


@dataclass(frozen=True)
class Options:
    """Options of the script."""

    examples: int = 100_000
    """Examples in the training split."""
    words: int = 40
    """Words in a prompt; an answer has a fifth as many."""


def anonymous_memory_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes, without pages of mapped files."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def main(options: Options) -> None:
    """Measure tokenization, then the making, opening and reading of the tokenized data set; print lines."""
    task, tokenizer = _make_task(options), _make_tokenizer()
    _measure_tokenization(task, tokenizer, min(options.examples, 20_000))
    with tempfile.TemporaryDirectory() as folder:
        _measure_dataset(Path(folder), task, tokenizer)


def _make_task(options: Options) -> Task:
    class Texts(Task):
        name, title, floor, default_model = "texts", "texts", 0.0, ""
        defaults = TaskDefaults(options.examples, 100, 100, 1, 16, 2 * options.words, 1, (1e-3,))

        def examples(self, split: str, count: int) -> Sequence[Example]:
            source = random.Random(split)

            def draw(words: int) -> str:
                return " ".join(source.choices(WORDS, k=words))

            return [Example(draw(options.words), draw(options.words // 5)) for _ in range(count)]

    return Texts()


def _make_tokenizer() -> Any:
    return word_tokenizer(("<pad>", "<eos>", *WORDS), eos_token="<eos>")


def _measure_tokenization(task: Task, tokenizer: Any, count: int) -> None:
    sample = task.examples("train", count)
    blocks = [sample[start : start + TOKENIZER_BATCH_SIZE] for start in range(0, count, TOKENIZER_BATCH_SIZE)]
    for label, encode_sample in (
        ("one by one", lambda: [task.encode(example, tokenizer) for example in sample]),
        ("in blocks", lambda: [task.encode_all(block, tokenizer) for block in blocks]),
    ):
        started, used = time.monotonic(), time.process_time()
        encode_sample()
        wall, cpu = time.monotonic() - started, time.process_time() - used
        print(f"{label}: {wall / count * 1e6:.0f} us per example, {cpu / count * 1e6:.0f} us of CPU time")


def _measure_dataset(folder: Path, task: Task, tokenizer: Any) -> None:
    max_length = task.defaults.max_length
    configuration = Configuration(
        VariantChoice("lora"),
        task.choice(),
        ModelChoice("none", "0" * 64),
        OptimizerConfig(1e-3),
        LRSchedule(1),
        BatchConfig(16, 1, max_length),
        evaluations=1,
    )
    started, used = time.monotonic(), time.process_time()
    dataset_cache.prepare_dataset(folder, configuration, task, tokenizer)
    size = sum(path.stat().st_size for path in folder.iterdir())
    cpu = time.process_time() - used
    print(
        f"made in {time.monotonic() - started:.1f} s ({cpu:.1f} s of CPU time), {size / 1e6:.0f} MB on disk"
    )
    before, started = anonymous_memory_bytes(), time.monotonic()
    dataset = dataset_cache.prepare_dataset(folder, configuration, task, tokenizer)
    print(f"opened in {time.monotonic() - started:.2f} s", end=", ")
    started = time.monotonic()
    for number in range(1000):
        make_training_batch(dataset.rows["train"], 0, 16 * number, 16, max_length, 0)
    print(f"a batch of 16 in {time.monotonic() - started:.2f} ms", end=", ")
    print(f"{max(0, anonymous_memory_bytes() - before) / 1e6:.0f} MB of anonymous memory")
    before = anonymous_memory_bytes()
    rows = encode_examples(list(dataset.examples["train"]), task, tokenizer, max_length)
    print(f"as tuples {max(0, anonymous_memory_bytes() - before) / 1e6:.0f} MB ({len(rows)} rows)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
