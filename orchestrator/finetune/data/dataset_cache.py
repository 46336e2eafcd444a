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

from orchestrator.finetune.data.arrow_images import ImageRows, StoredImages, shown
from orchestrator.finetune.data.arrow_rows import Stored, batch_of
from orchestrator.finetune.data.batches import Row, longest, rows_of
from orchestrator.finetune.tasks.base import HELD_OUT, SPLITS, Example, Split, Task
from orchestrator.study.configuration import Configuration, TaskChoice, canonical
from orchestrator.util import atomic_files, user_code
from orchestrator.util.errors import BadInput

T = TypeVar("T")

Progress = Callable[[str], None]
View = Callable[[Sequence[Any]], Sequence[T]]
"""Of a file's record batches."""

TEXT, BYTES, INTEGER, INTEGERS, NUMBERS = (
    pa.large_string(),
    pa.large_binary(),
    pa.int32(),
    pa.large_list(pa.int32()),
    pa.large_list(pa.float64()),
)
EXAMPLES = {"prompt": TEXT, "answer": TEXT, "pair": TEXT, "truth": TEXT, "scored": TEXT}
"""Field -> column, of `Example`; each may be None."""
IMAGES = {"answer": TEXT, "name": TEXT, "file": BYTES, "digest": TEXT}
"""The same of `Shown`."""
ROWS = {"ids": INTEGERS, "targets": INTEGERS, "prompt": INTEGERS, "second": INTEGER}
"""The same of `Row`. Targets that are values are numbers."""

FORMAT = 2
"""Raised by hand when what is kept of the same task changes. 1: token ids without the tokenizer's BOS."""
DIGEST, BATCHES = b"sha256", b"batches"
CHUNK = 4096
FILES_CHUNK = 128  # of images: they are in memory until they are written, a photo may be a megabyte
QUIET_SECONDS = 4.0


def silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Prepared:
    examples: Mapping[Split, Sequence[Example]]
    rows: Mapping[Split, Sequence[Row]]


def prepare(
    folder: Path, configuration: Configuration, task: Task, processor: Any, progress: Progress = silent
) -> Prepared:
    """Examples and rows as the configuration wants them, from `folder`, made first where they are lacking.
    Raises BadInput as `examples` and `data.rows_of` do."""
    found = examples(folder, configuration.task, task, progress)
    _check_scored(found, task)
    if task.inputs == "image":  # there is nothing to tokenise
        return Prepared(found, {split: ImageRows(of, task) for split, of in found.items()})
    length = configuration.batches.max_length
    held_out = longest(task, length) if task.has_head else None  # else they are kept whole
    reader = _tokenizer(processor)
    rows: dict[Split, Sequence[Row]] = {}
    for split, of in found.items():
        cut = length if split == "train" else held_out
        about = {
            **_about(configuration.task, task, split),
            "numerics": task.numerics,
            "model": configuration.model.content,
            "tokenizer": reader,
            "cut": cut,
        }
        tell = _Tell(f"{Path(task.name).stem}: %d of {len(of)} {split} examples tokenised", progress)
        columns = {**ROWS, "targets": NUMBERS} if task.answers == "value" else ROWS
        make = partial(rows_of, of, task, processor, cut, tell)
        rows[split] = _kept(folder, f"{Path(task.name).stem}-%s.rows.arrow", about, columns, _of(Row), make)
    return Prepared(found, rows)


def largest_id(found: Prepared) -> int:
    """Return the largest token id of all rows of texts, -1 where they have none."""
    return max(rows.largest("ids") for rows in found.rows.values() if isinstance(rows, Stored))


def longest_row(found: Prepared, task: Task) -> int:
    """Return how many tokens the model is given at once, at most, of the rows of texts: those of a row, or of
    a prompt and of the answer that is generated to it (whose last token it is not given)."""
    rows = {split: of for split, of in found.rows.items() if isinstance(of, Stored)}
    most = max(of.longest("ids") for of in rows.values())
    if task.answers != "generated":
        return most
    return max(most, *(rows[split].longest("prompt") + task.max_new_tokens - 1 for split in HELD_OUT))


def examples(
    folder: Path, choice: TaskChoice, task: Task, progress: Progress = silent
) -> dict[Split, Sequence[Example]]:
    """The examples that `choice` names. Raises BadInput when they are not there and the task's own are others
    (or cannot be had), or are no text."""
    loaded: dict[Split, Sequence[Example]] = {}

    def make(split: Split) -> Iterable[object]:
        if not loaded:
            progress(f"{Path(task.name).stem}: reading the examples")
            with user_code.told(task.name, "gives no examples"):
                loaded.update(task.load(choice))
        return shown(loaded[split], task) if task.inputs == "image" else loaded[split]

    name, columns, view = _examples_of(task)
    return {
        split: _kept(folder, name, _about(choice, task, split), columns, view, partial(make, split))
        for split in SPLITS
    }


def _check_scored(found: Mapping[Split, Sequence[Example]], task: Task) -> None:
    """The loop watches the validation loss, and a record has the metric on both splits. Raises BadInput for a
    task that gives no example for one of them."""
    wanted: list[tuple[Split, str, str]] = [("validation", "loss", "grade")]
    if task.answers == "generated":
        wanted += [(split, "metric", "loss") for split in HELD_OUT]
    else:
        wanted += [("test", "loss", "grade")]
    for split, what, other in wanted:
        if all(example.scored == other for example in found[split]):
            raise BadInput(f"Task {task.name!r}: no {split} example counts in the {what}.")


def has_examples(folder: Path, choice: TaskChoice, task: Task) -> bool:
    """Whether they are there for `examples`, which would then ask the task for none."""
    name, columns, view = _examples_of(task)
    return all(
        _read(*_place(folder, name, _about(choice, task, split), columns), view) is not None
        for split in SPLITS
    )


def _examples_of(task: Task) -> tuple[str, Mapping[str, Any], View[Example]]:
    """The files' name, their columns, and what reads them."""
    name = f"{Path(task.name).stem}-%s.examples.arrow"
    return (name, IMAGES, StoredImages) if task.inputs == "image" else (name, EXAMPLES, _of(Example))


def _of(kind: Callable[..., T]) -> View[T]:
    return partial(Stored, of=kind)


def _about(choice: TaskChoice, task: Task, split: Split) -> dict[str, Any]:
    """What decides a split's examples."""
    size = {"train": choice.train_size, "validation": choice.validation_size, "test": choice.test_size}[split]
    return {
        "format": FORMAT,
        "task": Path(task.name).stem,
        "file": content_of_file(task),
        "revision": choice.revision,
        "split": split,
        "size": size,
    }


def content_of_file(task: Task) -> str:
    """A user's file is known by its content, wherever it lies; empty for a task of the project's."""
    file = Path(task.name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" else ""


def _tokenizer(tokenizer: Any) -> str:
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
    return hashlib.sha256(canonical(found)).hexdigest()


# -- files ---------------------------------------------------------------------------------------------------


def _kept(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    columns: Mapping[str, Any],
    view: View[T],
    make: Callable[[], Iterable[object]],
) -> Sequence[T]:
    """The values of the file that is about this; `make` gives them where there is none. One process on a
    node, and on others where storage has locks, makes it, and the others wait for that; without locks either
    of two is whole, and the first one counts."""
    from filelock import FileLock

    path, schema = _place(folder, name, about, columns)
    if (found := _read(path, schema, view)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{about['task']}.lock"):
        if (found := _read(path, schema, view)) is not None:
            return found
        with _written(path, schema, make(), about) as source:
            # A name that is taken is a torn file's, or another node's that was faster.
            if not atomic_files.link(source, path) and _read(path, schema, view) is None:
                with atomic_files.naming(path):
                    os.replace(source, path)
    found = _read(path, schema, view)
    assert found is not None, f"{path} is not what was written there"
    return found


def _place(folder: Path, name: str, about: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[Path, Any]:
    """The file that is about this, and its schema."""
    key = canonical(dict(about))
    schema = pa.schema(list(columns.items()), metadata={"about": key})
    return folder / (name % hashlib.sha256(key).hexdigest()[:16]), schema


def _read(path: Path, schema: Any, view: View[T]) -> Sequence[T] | None:
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
            if metadata is None or metadata.get(DIGEST) != _digest(batch):
                return None
            batches.append(batch)
            count = metadata.get(BATCHES)
    except (OSError, pa.ArrowException):
        return None
    return view(batches) if count == str(len(batches)).encode() else None


@contextmanager
def _written(path: Path, schema: Any, values: Iterable[object], about: Mapping[str, Any]) -> Iterator[Path]:
    """A synced file with the values, under a name nobody else uses (`gc` knows it); gone afterwards."""
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with name.open("xb") as file:
            with ipc.new_file(file, schema) as writer:
                done, source = 0, iter(values)
                size = FILES_CHUNK if BYTES in schema.types else CHUNK
                chunk, number = list(islice(source, size)), 1
                while True:
                    batch, ahead = _batch(chunk, schema, done, about), list(islice(source, size))
                    metadata = {DIGEST: _digest(batch)} | ({} if ahead else {BATCHES: str(number).encode()})
                    writer.write_batch(batch, custom_metadata=metadata)
                    if not ahead:
                        break
                    done, chunk, number = done + len(chunk), ahead, number + 1
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        name.unlink(missing_ok=True)


def _digest(batch: Any) -> bytes:
    """Return the SHA-256 (hex) of a record batch's IPC message, which is the same for equal batches.

    Images' files are left out: each has a digest of its own.
    """
    small = batch.select([field.name for field in batch.schema if field.type != BYTES])
    return hashlib.sha256(small.serialize()).hexdigest().encode()


def _batch(chunk: Sequence[object], schema: Any, done: int, about: Mapping[str, Any]) -> Any:
    try:
        return batch_of(chunk, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError) as error:
        for number, value in enumerate(chunk, done):
            try:
                batch_of([value], schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError) as reason:
                said = str(reason).splitlines()[0]
                what = f"{about['split']} example {number} cannot be kept: {said}"
                raise BadInput(f"Task {about['task']!r}: {what}") from None
        raise error


class _Tell:
    """Says how far it is, once that takes long."""

    def __init__(self, text: str, progress: Progress) -> None:
        self._text, self._progress = text, progress
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            self._progress(self._text % done)
