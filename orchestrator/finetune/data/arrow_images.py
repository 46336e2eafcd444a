"""Examples of image tasks. The bytes of image files stay on disk until an image is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from orchestrator.finetune.data.arrow_rows import ArrowSequence
from orchestrator.finetune.data.batches import to_image_row
from orchestrator.finetune.tasks.base import Example, Image, Task
from orchestrator.util.atomic_files import DamagedFileError


def serialize_image_examples(examples: Iterable[Example], task: Task) -> Iterator[dict[str, Any]]:
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


def read_image_examples(table: Any) -> Sequence[Example]:
    """Return the examples of a table with the columns of `serialize_image_examples`.

    Each example is built once, since caches of decoded images use its `Image` object as their key. An image
    file is read, and its digest verified, when `Image.read` is called.
    """
    files = ArrowSequence(table.select(["name", "file", "digest"]), _verify_image_digest)
    labels = zip(table["answer"].to_pylist(), table["name"].to_pylist(), strict=True)
    return [
        Example("", answer, image=Image(name, partial(files.__getitem__, index)))
        for index, (answer, name) in enumerate(labels)
    ]


def _verify_image_digest(name: str, file: bytes, digest: str) -> bytes:
    if hashlib.sha256(file).hexdigest() != digest:
        raise DamagedFileError(
            f"image {name}: its file in the store's data folder is not what was written there"
        )
    return file
