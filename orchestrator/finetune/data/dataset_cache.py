"""The examples and token ids of tasks, cached on disk.

Examples are read from their source, and tokenized, once; every worker then maps the cached files into memory
(see `arrow_files`). Once the files exist, no worker needs the model hub or the original data.

    <folder>/letters-3f9c0a1b2c3d4e5f.examples.arrow     the examples of a split
    <folder>/letters-77aa10c9b2e4d5f6.rows.arrow         a split, tokenized and truncated
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.finetune.data.arrow_files import (
    BYTES,
    FLOAT_LIST,
    INTEGER,
    INTEGER_LIST,
    TEXT,
    ArrowFile,
    ArrowSequence,
)
from orchestrator.finetune.data.batches import (
    Row,
    compute_max_row_length,
    iter_encoded_examples,
    to_image_row,
)
from orchestrator.finetune.tasks.base import SPLITS, Example, Image, Split, Task
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS
from orchestrator.study.configuration import Configuration, TaskChoice
from orchestrator.util import timeouts
from orchestrator.util.atomic_files import canonical_json
from orchestrator.util.errors import UsageError, report_user_errors

EXAMPLE_COLUMNS = {"prompt": TEXT, "answer": TEXT, "pair": TEXT, "reference": TEXT, "counts_in": TEXT}
"""The fields of `Example` except its image, in their order."""
IMAGE_COLUMNS = {"answer": TEXT, "name": TEXT, "file": BYTES, "digest": TEXT}
ROW_COLUMNS = {"ids": INTEGER_LIST, "targets": INTEGER_LIST, "prompt": INTEGER_LIST, "second": INTEGER}
"""The columns of `Row`, except its image. Targets of regression tasks are a FLOAT_LIST."""


FORMAT_VERSION = 1
"""To be raised when the stored content of a task changes."""


@dataclass(frozen=True)
class PreparedDataset:
    """The examples and tokenized rows of a task, by split.

    Row k of a held-out split belongs to example k. Training examples that lose their answer by truncation
    have no row.
    """

    examples: Mapping[Split, Sequence[Example]]
    rows: Mapping[Split, Sequence[Row]]


def prepare_dataset(
    folder: Path,
    configuration: Configuration,
    task: Task,
    processor: Any,
    progress: Callable[[str], None] = lambda line: None,
) -> PreparedDataset:
    """Return the examples and rows of a configuration, created first where they are not cached.

    Args:
        folder: The cache folder.
        configuration: The configuration; it names the task's data and decides the maximum length.
        task: The configuration's task.
        processor: The model's tokenizer; not used for image tasks.
        progress: Called with one line before or during work that takes long.

    Returns:
        The dataset, mapped from files.

    Raises:
        UsageError: The examples cannot be read or encoded, or none counts in the loss or in the metric.
    """
    examples_by_split = load_examples(folder, configuration.task, task, progress)
    _check_counts_in(examples_by_split, task)
    if task.inputs == "image":  # decoded and resized when a batch is computed
        rows = {
            split: list(iter_encoded_examples(e, task, processor)) for split, e in examples_by_split.items()
        }
        return PreparedDataset(examples_by_split, rows)
    max_length = configuration.batches.max_length
    # Held-out examples are truncated only where a head reads them: an answer is scored in full.
    held_out_max_length = compute_max_row_length(task, max_length) if task.has_head else None
    tokenizer_digest = _tokenizer_digest(processor)
    cached_rows: dict[Split, Sequence[Row]] = {}
    for split, examples in examples_by_split.items():
        split_max_length = max_length if split == "train" else held_out_max_length
        cache_key = {
            **_example_cache_key(configuration.task, task, split),
            "numerics": task.numerics,
            "model": configuration.model.content,
            "tokenizer": tokenizer_digest,
            "cut": split_max_length,
        }
        report_progress = _rate_limited(
            f"{task.name}: %d of {len(examples)} {split} examples tokenized", progress
        )
        columns = {**ROW_COLUMNS, "targets": FLOAT_LIST} if task.output == "regression" else ROW_COLUMNS
        file = ArrowFile(folder, "rows", cache_key, columns, partial(ArrowSequence, factory=Row))
        cached_rows[split] = file.read_or_create(
            partial(_encode_columns, examples, task, processor, split_max_length, report_progress)
        )
    return PreparedDataset(examples_by_split, cached_rows)


def _encode_columns(*arguments: Any) -> Iterator[dict[str, Any]]:
    """Tokenize examples as `iter_encoded_examples` does, and yield the values of each row's columns."""
    for row in iter_encoded_examples(*arguments):
        values = (row.ids, row.targets, row.prompt, row.second_segment_start)
        yield dict(zip(ROW_COLUMNS, values, strict=True))


def max_token_id(dataset: PreparedDataset) -> int:
    """Return the largest token id in a dataset of texts, -1 if it has none."""
    return max(rows.max_value("ids") for rows in dataset.rows.values() if isinstance(rows, ArrowSequence))


def compute_max_sequence_length(dataset: PreparedDataset, task: Task) -> int:
    """Return the largest number of tokens that the model reads in one sequence of a dataset of texts.

    This is the length of the longest row. If answers are generated, it is at least the length of the longest
    prompt with all but the last token of the longest answer.
    """
    rows = {split: found for split, found in dataset.rows.items() if isinstance(found, ArrowSequence)}
    lengths = [sequence.max_list_length("ids") for sequence in rows.values()]
    if task.output == "generation":
        lengths += [rows[s].max_list_length("prompt") + task.max_new_tokens - 1 for s in HELD_OUT_SPLITS]
    return max(lengths)


def load_examples(
    folder: Path, choice: TaskChoice, task: Task, progress: Callable[[str], None] = lambda line: None
) -> dict[Split, Sequence[Example]]:
    """Return the examples of each split, read from their source first where they are not cached.

    Args:
        folder: The cache folder.
        choice: The data revision and the sizes of the splits.
        task: The task.
        progress: Receives a line before the source is read.

    Raises:
        UsageError: The source cannot be read or has another revision than `choice`, or an example cannot be
            stored, for instance because its prompt is not text.
    """
    loaded: dict[Split, Sequence[Example]] = {}

    def make_split(split: Split) -> Iterable[Mapping[str, Any]]:
        if not loaded:
            progress(f"{task.name}: reading the examples")
            with report_user_errors(task.source, "gives no examples"):
                loaded.update(task.load(choice))
        if task.inputs == "image":
            return _serialize_image_examples(loaded[split], task)
        return map(_serialize_example, loaded[split])

    return {
        split: _example_file(folder, choice, task, split).read_or_create(partial(make_split, split))
        for split in SPLITS
    }


def _check_counts_in(examples_by_split: Mapping[Split, Sequence[Example]], task: Task) -> None:
    """Refuse a task without a validation loss, or without a metric on a held-out split.

    Raises:
        UsageError: All examples of such a split are excluded from the loss, or from the metric.
    """
    required: list[tuple[Split, str, str]] = [("validation", "loss", "metric")]
    if task.output == "generation":
        required += [(split, "metric", "loss") for split in HELD_OUT_SPLITS]
    else:
        required += [("test", "loss", "metric")]
    for split, what, other in required:
        if all(example.counts_in == other for example in examples_by_split[split]):
            raise UsageError(f"Task {task.name!r}: no {split} example counts in the {what}.")


def _example_file(folder: Path, choice: TaskChoice, task: Task, split: Split) -> ArrowFile[Example]:
    cache_key = _example_cache_key(choice, task, split)
    if task.inputs == "image":
        return ArrowFile(folder, "examples", cache_key, IMAGE_COLUMNS, _read_image_examples)
    make_view = partial(ArrowSequence, factory=Example)
    return ArrowFile(folder, "examples", cache_key, EXAMPLE_COLUMNS, make_view)


def _serialize_example(example: Example) -> dict[str, Any]:
    """Return the values of an example's columns."""
    return {name: getattr(example, name) for name in EXAMPLE_COLUMNS}


def _serialize_image_examples(examples: Iterable[Example], task: Task) -> Iterator[dict[str, Any]]:
    """Read the image files of examples, one at a time, and yield the values of each example's columns.

    Raises:
        UsageError: An example has no image.
    """
    for number, example in enumerate(examples):
        image = to_image_row(example, task, number).image
        assert image is not None
        file = image.read()
        digest = hashlib.sha256(file).hexdigest()
        yield {"answer": example.answer, "name": image.name, "file": file, "digest": digest}


def _read_image_examples(table: Any) -> Sequence[Example]:
    """Return the examples of a table with the columns of `_serialize_image_examples`.

    Each example is built once, since caches of decoded images use its `Image` object as their key. The bytes
    of an image file stay on disk until `Image.read` is called, which verifies their digest.
    """
    files = ArrowSequence(table.select(["name", "file", "digest"]), _verify_image)
    labels = zip(table["answer"].to_pylist(), table["name"].to_pylist(), strict=True)
    return [
        Example("", answer, image=Image(name, partial(files.__getitem__, index)))
        for index, (answer, name) in enumerate(labels)
    ]


def _verify_image(name: str, file: bytes, digest: str) -> bytes:
    if hashlib.sha256(file).hexdigest() != digest:
        raise UsageError(
            f"image {name}: its file in the store's data folder is not what was written there; remove the "
            "task's *.examples.arrow there."
        )
    return file


def _example_cache_key(choice: TaskChoice, task: Task, split: Split) -> dict[str, Any]:
    """Return what decides the examples of a split."""
    size = {"train": choice.train_size, "validation": choice.validation_size, "test": choice.test_size}[split]
    return {
        "format": FORMAT_VERSION,
        "task": task.content or task.name,
        "revision": choice.revision,
        "split": split,
        "size": size,
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 (hex) of what decides token ids.

    The digest covers the class of the tokenizer, its end token, and the rules and vocabulary of a fast
    tokenizer, the vocabulary of a slow one, or the JSON of another processor. A digest of the model's files
    would not be enough: another version of a library may read them in another way.
    """
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(fast.to_str())
        rules.update(padding=None, truncation=None)  # they depend on the last call
    elif hasattr(tokenizer, "get_vocab"):
        rules = tokenizer.get_vocab()
    else:
        rules = tokenizer.to_json_string()
    found = [type(tokenizer).__name__, getattr(tokenizer, "eos_token_id", None), rules]
    return hashlib.sha256(canonical_json(found)).hexdigest()


def _rate_limited(text: str, progress: Callable[[str], None]) -> Callable[[int], None]:
    """Return a function that reports how many examples are done, at intervals.

    Args:
        text: A line with %d for the number of examples.
        progress: Receives the lines.
    """
    last_report_time = time.monotonic()

    def report(done: int) -> None:
        nonlocal last_report_time
        if time.monotonic() - last_report_time > timeouts.PROGRESS_INTERVAL_SECONDS:
            last_report_time = time.monotonic()
            progress(text % done)

    return report
