"""Examples and rows of image tasks. The bytes of image files stay on disk until an image is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from orchestrator.finetune.data.arrow_rows import ArrowSequence, LazySequence
from orchestrator.finetune.data.batches import Row, to_image_row
from orchestrator.finetune.tasks.base import Example, Image, Task
from orchestrator.util.atomic_files import DamagedFileError


@dataclass(frozen=True)
class SerializedImageExample:
    """An image example as it is stored: the fields are the columns of an Arrow file."""

    answer: str
    name: str
    file: bytes
    digest: str
    """SHA-256 (hex) of `file`."""


def serialize_image_examples(examples: Iterable[Example], task: Task) -> Iterator[SerializedImageExample]:
    """Read the image files of examples, one at a time.

    Raises:
        UsageError: An example has no image.
    """
    for number, example in enumerate(examples):
        image = to_image_row(example, task, number).image
        assert image is not None
        file = image.read()
        yield SerializedImageExample(example.answer, image.name, file, hashlib.sha256(file).hexdigest())


def read_image_examples(batches: Sequence[Any]) -> Sequence[Example]:
    """Return the examples in record batches of `SerializedImageExample`.

    Each example is built once, since caches of decoded images use its `Image` object as their key. An image
    file is read, and its digest verified, when `Image.read` is called.
    """
    labels = ArrowSequence(batches, lambda answer, name: (answer, name), ("answer", "name"))
    files = ArrowSequence(batches, _verify_image_digest, ("name", "file", "digest"))

    @cache
    def build_example(index: int) -> Example:
        answer, name = labels[index]
        return Example("", answer, image=Image(name, partial(files.__getitem__, index)))

    return LazySequence(len(labels), build_example)


def _verify_image_digest(name: str, file: bytes, digest: str) -> bytes:
    if hashlib.sha256(file).hexdigest() != digest:
        raise DamagedFileError(
            f"image {name}: its file in the store's data folder is not what was written there"
        )
    return file


def build_image_rows(examples: Sequence[Example], task: Task) -> Sequence[Row]:
    """Return one row per image example, built on access."""
    return LazySequence(len(examples), lambda index: to_image_row(examples[index], task, index))
