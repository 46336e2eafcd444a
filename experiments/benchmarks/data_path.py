"""What a task's data cost: tokenising many short examples, and the memory of a worker that reads them.

    python experiments/benchmarks/data_path.py --examples 100000

Made of synthetic texts, with a word-level tokenizer of our own (no hub is asked); nothing is kept.
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


@dataclass(frozen=True)
class Options:
    examples: int = 100_000
    """In the training split."""
    words: int = 40
    """Of a prompt; an answer has a fifth of it."""


def anonymous_memory_bytes() -> int:
    """Of this process, no file's pages, in bytes."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def main(options: Options) -> None:
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

    class Texts(Task):
        name, title, floor, default_model = "texts", "texts", 0.0, ""
        defaults = TaskDefaults(options.examples, 100, 100, 1, 16, 2 * options.words, 1, (1e-3,))

        def examples(self, split: Any, count: int) -> Sequence[Example]:  # type: ignore[override]
            source = random.Random(split)
            words = [f"w{i}" for i in range(1000)]
            draw = lambda n: " ".join(source.choices(words, k=n))  # noqa: E731
            return [Example(draw(options.words), draw(options.words // 5)) for _ in range(count)]

    task = Texts()
    tokenizer = word_tokenizer(("<pad>", "<eos>", *(f"w{i}" for i in range(1000))), eos_token="<eos>")
    configuration = Configuration(
        VariantChoice("lora"),
        task.choice(),
        ModelChoice("none", "0" * 64),
        OptimizerConfig(1e-3),
        LRSchedule(1),
        BatchConfig(16, 1, task.defaults.max_length),
        evaluations=1,
    )
    sample = task.examples("train", min(options.examples, 20_000))
    blocks = [
        sample[start : start + TOKENIZER_BATCH_SIZE] for start in range(0, len(sample), TOKENIZER_BATCH_SIZE)
    ]
    for label, encode_sample in (
        ("one by one", lambda: [task.encode(example, tokenizer) for example in sample]),
        ("together", lambda: [task.encode_all(block, tokenizer) for block in blocks]),
    ):
        began, used = time.monotonic(), time.process_time()
        encode_sample()
        wall, cpu = time.monotonic() - began, time.process_time() - used
        print(
            f"{label}: {wall / len(sample) * 1e6:.0f} us an example, {cpu / len(sample) * 1e6:.0f} us of CPU"
        )
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.monotonic(), time.process_time()
        dataset_cache.prepare_dataset(Path(folder), configuration, task, tokenizer)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        cpu = time.process_time() - used
        print(f"made in {time.monotonic() - began:.1f} s ({cpu:.1f} s of CPU), {size / 1e6:.0f} MB on disk")
        before, began = anonymous_memory_bytes(), time.monotonic()
        dataset = dataset_cache.prepare_dataset(Path(folder), configuration, task, tokenizer)
        print(f"opened in {time.monotonic() - began:.2f} s", end=", ")
        began = time.monotonic()
        for number in range(1000):
            make_training_batch(dataset.rows["train"], 0, 16 * number, 16, task.defaults.max_length, 0)
        print(f"a batch of 16 in {time.monotonic() - began:.2f} ms", end=", ")
        print(f"memory of its own {max(0, anonymous_memory_bytes() - before) / 1e6:.0f} MB")
        before = anonymous_memory_bytes()
        examples = list(dataset.examples["train"])
        rows = encode_examples(examples, task, tokenizer, task.defaults.max_length)
        print(f"as tuples {max(0, anonymous_memory_bytes() - before) / 1e6:.0f} MB ({len(rows)} rows)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
