"""Examples of a task of images in an Arrow file: their files' bytes stay there until one is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from orchestrator.finetune.data.arrow_rows import ArrowSequence
from orchestrator.finetune.data.batches import Row, to_image_row
from orchestrator.finetune.tasks.base import Example, Image, Task
from orchestrator.util.atomic_files import DamagedFileError


@dataclass(frozen=True)
class SerializedImageExample:
    """What is kept of an example."""

    answer: str
    name: str
    file: bytes
    digest: str
    """SHA-256 (hex) of `file`."""


def serialize_image_examples(examples: Iterable[Example], task: Task) -> Iterator[SerializedImageExample]:
    """Raises BadInput for an example without an image."""
    for number, example in enumerate(examples):
        image = to_image_row(example, task, number).image
        assert image is not None
        file = image.read()
        yield SerializedImageExample(example.answer, image.name, file, hashlib.sha256(file).hexdigest())


class ArrowImageExamples(Sequence[Example]):
    """Each example is made once: a decoded image is known by its `Image`."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._labels = ArrowSequence(batches, lambda answer, name: (answer, name), ("answer", "name"))
        self._files: ArrowSequence[bytes] = ArrowSequence(
            batches, _verify_image_digest, ("name", "file", "digest")
        )
        self._examples: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if place not in self._examples:
            answer, name = self._labels[place]
            image = Image(name, partial(self._files.__getitem__, place))
            self._examples[place] = Example("", answer, image=image)
        return self._examples[place]


def _verify_image_digest(name: str, file: bytes, digest: str) -> bytes:
    """Return the bytes of an image's file. Raises Damaged when they are not those that were written."""
    if hashlib.sha256(file).hexdigest() != digest:
        raise DamagedFileError(
            f"image {name}: its file in the store's data folder is not what was written there"
        )
    return file


class ImageRows(Sequence[Row]):
    """The rows of `examples`, which hold nothing that is not theirs."""

    def __init__(self, examples: Sequence[Example], task: Task) -> None:
        self._examples, self._task = examples, task

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return to_image_row(self._examples[place], self._task, place)
