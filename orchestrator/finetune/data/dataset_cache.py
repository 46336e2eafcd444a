"""A task's examples and their token ids on disk: made once, never changed, memory-mapped by every worker.

    <folder>/letters-3f9c0a1b2c3d4e5f.examples.arrow     a split as the task gives it
    <folder>/letters-77aa10c9b2e4d5f6.rows.arrow         a split as one tokenizer and length cut it

A file's name is a hash over all that its content follows from, which stands in full in its metadata; every
record batch has a SHA-256 of its own, and every image's file; the last batch says how many there are. A file
that is torn, damaged, or another's, is made anew; an image's file is checked when the image is read.
Arrow's IPC format: opened without running code, and a reader's memory is the page cache, which the workers of
a node share. Where the examples are, no worker needs the hub, or the file that they came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import ipc

from orchestrator.finetune.data.arrow_images import ArrowImageExamples, ImageRows, serialize_image_examples
from orchestrator.finetune.data.arrow_rows import ArrowSequence, to_record_batch
from orchestrator.finetune.data.batches import Row, compute_max_row_length, iter_encoded_examples
from orchestrator.finetune.tasks.base import HELD_OUT_SPLITS, SPLITS, Example, Split, Task
from orchestrator.study.configuration import Configuration, TaskChoice, canonical_json
from orchestrator.util import atomic_files, user_code
from orchestrator.util.errors import UsageError

T = TypeVar("T")

ProgressCallback = Callable[[str], None]
ViewFactory = Callable[[Sequence[Any]], Sequence[T]]
"""Of a file's record batches."""

TEXT, BYTES, INTEGER, INTEGER_LIST, FLOAT_LIST = (
    pa.large_string(),
    pa.large_binary(),
    pa.int32(),
    pa.large_list(pa.int32()),
    pa.large_list(pa.float64()),
)
EXAMPLE_COLUMNS = {"prompt": TEXT, "answer": TEXT, "pair": TEXT, "truth": TEXT, "scored": TEXT}
"""Field -> column, of `Example`; each may be None."""
IMAGE_COLUMNS = {"answer": TEXT, "name": TEXT, "file": BYTES, "digest": TEXT}
"""The same of `Shown`."""
ROW_COLUMNS = {"ids": INTEGER_LIST, "targets": INTEGER_LIST, "prompt": INTEGER_LIST, "second": INTEGER}
"""The same of `Row`. Targets that are values are numbers."""

FORMAT_VERSION = 2
"""Raised by hand when what is kept of the same task changes. 1: token ids without the tokenizer's BOS."""
DIGEST_KEY, BATCH_COUNT_KEY = b"sha256", b"batches"
RECORD_BATCH_ROWS = 4096
IMAGE_RECORD_BATCH_ROWS = (
    128  # of images: they are in memory until they are written, a photo may be a megabyte
)
PROGRESS_INTERVAL_SECONDS = 4.0


def ignore_progress(text: str) -> None:
    pass


@dataclass(frozen=True)
class PreparedDataset:
    examples: Mapping[Split, Sequence[Example]]
    rows: Mapping[Split, Sequence[Row]]


def prepare_dataset(
    folder: Path,
    configuration: Configuration,
    task: Task,
    processor: Any,
    progress: ProgressCallback = ignore_progress,
) -> PreparedDataset:
    """Examples and rows as the configuration wants them, from `folder`, made first where they are lacking.
    Raises BadInput as `examples` and `data.rows_of` do."""
    examples_by_split = load_examples(folder, configuration.task, task, progress)
    _check_counts_in(examples_by_split, task)
    if task.inputs == "image":  # there is nothing to tokenise
        return PreparedDataset(
            examples_by_split, {split: ImageRows(of, task) for split, of in examples_by_split.items()}
        )
    length = configuration.batches.max_length
    held_out_max_length = (
        compute_max_row_length(task, length) if task.has_head else None
    )  # else they are kept whole
    tokenizer_digest = _tokenizer_digest(processor)
    rows: dict[Split, Sequence[Row]] = {}
    for split, split_examples in examples_by_split.items():
        split_max_length = length if split == "train" else held_out_max_length
        cache_key = {
            **_example_cache_key(configuration.task, task, split),
            "numerics": task.numerics,
            "model": configuration.model.content,
            "tokenizer": tokenizer_digest,
            "cut": split_max_length,
        }
        report_progress = _ProgressReporter(
            f"{Path(task.name).stem}: %d of {len(split_examples)} {split} examples tokenised", progress
        )
        columns = {**ROW_COLUMNS, "targets": FLOAT_LIST} if task.output == "value" else ROW_COLUMNS
        make = partial(
            iter_encoded_examples, split_examples, task, processor, split_max_length, report_progress
        )
        rows[split] = _load_or_create(
            folder, f"{Path(task.name).stem}-%s.rows.arrow", cache_key, columns, _sequence_factory(Row), make
        )
    return PreparedDataset(examples_by_split, rows)


def max_token_id(dataset: PreparedDataset) -> int:
    """Return the largest token id of all rows of texts, -1 where they have none."""
    return max(rows.max_value("ids") for rows in dataset.rows.values() if isinstance(rows, ArrowSequence))


def compute_max_sequence_length(dataset: PreparedDataset, task: Task) -> int:
    """Return how many tokens the model is given at once, at most, of the rows of texts: those of a row, or of
    a prompt and of the answer that is generated to it (whose last token it is not given)."""
    rows = {
        split: sequence for split, sequence in dataset.rows.items() if isinstance(sequence, ArrowSequence)
    }
    max_length = max(of.max_list_length("ids") for of in rows.values())
    if task.output != "generated":
        return max_length
    return max(
        max_length,
        *(rows[split].max_list_length("prompt") + task.max_new_tokens - 1 for split in HELD_OUT_SPLITS),
    )


def load_examples(
    folder: Path, choice: TaskChoice, task: Task, progress: ProgressCallback = ignore_progress
) -> dict[Split, Sequence[Example]]:
    """The examples that `choice` names. Raises BadInput when they are not there and the task's own are others
    (or cannot be had), or are no text."""
    loaded: dict[Split, Sequence[Example]] = {}

    def make_split(split: Split) -> Iterable[object]:
        if not loaded:
            progress(f"{Path(task.name).stem}: reading the examples")
            with user_code.report_user_errors(task.name, "gives no examples"):
                loaded.update(task.load(choice))
        return serialize_image_examples(loaded[split], task) if task.inputs == "image" else loaded[split]

    name, columns, view = _example_storage(task)
    return {
        split: _load_or_create(
            folder, name, _example_cache_key(choice, task, split), columns, view, partial(make_split, split)
        )
        for split in SPLITS
    }


def _check_counts_in(examples_by_split: Mapping[Split, Sequence[Example]], task: Task) -> None:
    """The loop watches the validation loss, and a record has the metric on both splits. Raises BadInput for a
    task that gives no example for one of them."""
    wanted: list[tuple[Split, str, str]] = [("validation", "loss", "grade")]
    if task.output == "generated":
        wanted += [(split, "metric", "loss") for split in HELD_OUT_SPLITS]
    else:
        wanted += [("test", "loss", "grade")]
    for split, what, other in wanted:
        if all(example.counts_in == other for example in examples_by_split[split]):
            raise UsageError(f"Task {task.name!r}: no {split} example counts in the {what}.")


def has_examples(folder: Path, choice: TaskChoice, task: Task) -> bool:
    """Whether they are there for `examples`, which would then ask the task for none."""
    name, columns, view = _example_storage(task)
    return all(
        _read_cache_file(*_cache_file(folder, name, _example_cache_key(choice, task, split), columns), view)
        is not None
        for split in SPLITS
    )


def _example_storage(task: Task) -> tuple[str, Mapping[str, Any], ViewFactory[Example]]:
    """The files' name, their columns, and what reads them."""
    name = f"{Path(task.name).stem}-%s.examples.arrow"
    return (
        (name, IMAGE_COLUMNS, ArrowImageExamples)
        if task.inputs == "image"
        else (name, EXAMPLE_COLUMNS, _sequence_factory(Example))
    )


def _sequence_factory(element_type: Callable[..., T]) -> ViewFactory[T]:
    return partial(ArrowSequence, factory=element_type)


def _example_cache_key(choice: TaskChoice, task: Task, split: Split) -> dict[str, Any]:
    """What decides a split's examples."""
    size = {"train": choice.train_size, "validation": choice.validation_size, "test": choice.test_size}[split]
    return {
        "format": FORMAT_VERSION,
        "task": Path(task.name).stem,
        "file": task_file_digest(task),
        "revision": choice.revision,
        "split": split,
        "size": size,
    }


def task_file_digest(task: Task) -> str:
    """A user's file is known by its content, wherever it lies; empty for a task of the project's."""
    file = Path(task.name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" else ""


def _tokenizer_digest(tokenizer: Any) -> str:
    """Names what decides the ids: rules and vocabulary of a fast tokenizer, the words of another, what a
    processor says of itself; and the token that ends an answer. A model's files alone would not do: another
    version of a library may read them otherwise."""
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(fast.to_str())
        rules.update(padding=None, truncation=None)  # of the last call
    elif hasattr(tokenizer, "get_vocab"):
        rules = tokenizer.get_vocab()
    else:
        rules = tokenizer.to_json_string()
    found = [type(tokenizer).__name__, getattr(tokenizer, "eos_token_id", None), rules]
    return hashlib.sha256(canonical_json(found)).hexdigest()


# -- files ---------------------------------------------------------------------------------------------------


def _load_or_create(
    folder: Path,
    name: str,
    cache_key: Mapping[str, Any],
    columns: Mapping[str, Any],
    make_view: ViewFactory[T],
    make_values: Callable[[], Iterable[object]],
) -> Sequence[T]:
    """The values of the file that is about this; `make` gives them where there is none. One process on a
    node, and on others where storage has locks, makes it, and the others wait for that; without locks either
    of two is whole, and the first one counts."""
    from filelock import FileLock

    path, schema = _cache_file(folder, name, cache_key, columns)
    if (found := _read_cache_file(path, schema, make_view)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{cache_key['task']}.lock"):
        if (found := _read_cache_file(path, schema, make_view)) is not None:
            return found
        with _write_temporary_file(path, schema, make_values(), cache_key) as source:
            # A name that is taken is a torn file's, or another node's that was faster.
            if (
                not atomic_files.link_if_absent(source, path)
                and _read_cache_file(path, schema, make_view) is None
            ):
                with atomic_files.add_path_to_disk_errors(path):
                    os.replace(source, path)
    found = _read_cache_file(path, schema, make_view)
    assert found is not None, f"{path} is not what was written there"
    return found


def _cache_file(
    folder: Path, name: str, cache_key: Mapping[str, Any], columns: Mapping[str, Any]
) -> tuple[Path, Any]:
    """The file that is about this, and its schema."""
    encoded_key = canonical_json(dict(cache_key))
    schema = pa.schema(list(columns.items()), metadata={"about": encoded_key})
    return folder / (name % hashlib.sha256(encoded_key).hexdigest()[:16]), schema


def _read_cache_file(path: Path, schema: Any, make_view: ViewFactory[T]) -> Sequence[T] | None:
    """Return the view of a file, None when it is missing or not what was written.

    All of the file but images' files is read for that.
    """
    try:
        file = ipc.open_file(pa.memory_map(str(path)))
        if not file.schema.equals(schema, check_metadata=True):
            return None
        batches, count = [], None
        for number in range(file.num_record_batches):
            batch, metadata = file.get_batch_with_custom_metadata(number)
            batch.validate(full=True)  # lengths, and that text is text
            if metadata is None or metadata.get(DIGEST_KEY) != _digest(batch):
                return None
            batches.append(batch)
            count = metadata.get(BATCH_COUNT_KEY)
    except (OSError, pa.ArrowException):
        return None
    return make_view(batches) if count == str(len(batches)).encode() else None


@contextmanager
def _write_temporary_file(
    path: Path, schema: Any, values: Iterable[object], cache_key: Mapping[str, Any]
) -> Iterator[Path]:
    """A synced file with the values, under a name nobody else uses (`gc` knows it); gone afterwards."""
    temporary_file = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary_file.open("xb") as file:
            with ipc.new_file(file, schema) as writer:
                first_index, source = 0, iter(values)
                size = IMAGE_RECORD_BATCH_ROWS if BYTES in schema.types else RECORD_BATCH_ROWS
                chunk, number = list(islice(source, size)), 1
                while True:
                    batch, ahead = (
                        _to_checked_record_batch(chunk, schema, first_index, cache_key),
                        list(islice(source, size)),
                    )
                    metadata = {DIGEST_KEY: _digest(batch)} | (
                        {} if ahead else {BATCH_COUNT_KEY: str(number).encode()}
                    )
                    writer.write_batch(batch, custom_metadata=metadata)
                    if not ahead:
                        break
                    first_index, chunk, number = first_index + len(chunk), ahead, number + 1
            file.flush()
            os.fsync(file.fileno())
        yield temporary_file
    finally:
        temporary_file.unlink(missing_ok=True)


def _digest(batch: Any) -> bytes:
    """Return the SHA-256 (hex) of a record batch's IPC message, which is the same for equal batches.

    Images' files are left out: each has a digest of its own.
    """
    small = batch.select([field.name for field in batch.schema if field.type != BYTES])
    return hashlib.sha256(small.serialize()).hexdigest().encode()


def _to_checked_record_batch(
    chunk: Sequence[object], schema: Any, first_index: int, cache_key: Mapping[str, Any]
) -> Any:
    try:
        return to_record_batch(chunk, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError) as error:
        for number, value in enumerate(chunk, first_index):
            try:
                to_record_batch([value], schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError) as reason:
                message = str(reason).splitlines()[0]
                what = f"{cache_key['split']} example {number} cannot be kept: {message}"
                raise UsageError(f"Task {cache_key['task']!r}: {what}") from None
        raise error


class _ProgressReporter:
    """Says how far it is, once that takes long."""

    def __init__(self, text: str, progress: ProgressCallback) -> None:
        self._text, self._progress = text, progress
        self._last_report_time = time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._last_report_time > PROGRESS_INTERVAL_SECONDS:
            self._last_report_time = time.monotonic()
            self._progress(self._text % done)
