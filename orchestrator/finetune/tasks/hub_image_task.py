"""Image classification on datasets of the hub: what the published study's seven tasks have in common.

Every one is a dataset of columns `image` and `label`, a class's number. The published test set is the test
split, whole; a tenth of the training set, by the hash of an image's file, is the validation split. What both
sets have is not trained on, and what the training set has twice counts once.

As published (arXiv 2601.22708, section on images): CLIP ViT-B/16, top-1 accuracy, rank 8, ten learning rates,
the rest "identical to" its language tasks: AdamW, a cosine, batches of 64, and of the paper's scripts 3 % of
warm-up and weight decay 5e-4. It says neither how long it trains (here 1,000 steps: one epoch of the largest
set, 18 of the smallest) nor what the head reads (here the mean of the patches, as transformers' own
CLIPForImageClassification) nor how images are prepared (here as CLIP's processor does, without augmentation).
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, Table, load_table
from orchestrator.finetune.tasks.base import SPLITS, Example, Image, Split, Task, TaskDefaults, hash_split
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

HASH_BUCKETS = 10  # one training image in so many is for validation
COLUMNS = {"image": object, "label": int}
LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""As published."""


def image_defaults(train: int, validation: int, test: int) -> TaskDefaults:
    return TaskDefaults(
        train_size=train,
        validation_size=validation,
        test_size=test,
        steps=1000,
        batch_size=64,
        max_length=0,
        evaluations=4,
        learning_rates=LEARNING_RATES,
        warmup=0.03,
        weight_decay=5e-4,
    )


def numbered_classes(classes: int) -> tuple[str, ...]:
    """Classes by their number in the dataset: a head needs to know how many there are before any data are
    read, and data that have another number are refused."""
    return tuple(str(number) for number in range(classes))


class HubImageTask(Task):
    """A task gives its two tables, `labels`, `floor` (a class's mean share) and its defaults."""

    metric = "accuracy"
    default_model = "openai/clip-vit-base-patch16"
    inputs = "image"
    output = "classification"
    train_table: ClassVar[Table]
    test_table: ClassVar[Table]

    def examples(self, split: Split, count: int) -> list[Example]:
        found = _all_examples(
            self.train_table,
            self.test_table,
            len(self.labels),
            self.name,
            os.environ.get(DATA_FOLDER_VARIABLE),
        )[split]
        if count > len(found):
            raise UsageError(
                f"Task {self.name!r} has {len(found)} {split} examples in {self.train_table.repository}, {count} "
                "are needed."
            )
        return list(found[:count])


@lru_cache(maxsize=8)
def _all_examples(
    train: Table, test: Table, classes: int, task: str, folder: str | None
) -> dict[Split, tuple[Example, ...]]:
    """In the order of hashes: datasets lie class by class. `folder` is where `read` looks."""
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    found["test"] = _read_examples(test, classes, task)
    seen = {_digest(example) for example in found["test"]}
    for example in _read_examples(train, classes, task):
        if (digest := _digest(example)) not in seen:
            seen.add(digest)
            found[hash_split(digest, ("validation",), HASH_BUCKETS)].append(example)
    return {split: tuple(sorted(of, key=_sort_key)) for split, of in found.items()}


def _sort_key(example: Example) -> bytes:
    # Hashed again: split_of has picked the digests that begin alike.
    return hashlib.sha256(_digest(example).encode()).digest()


def _digest(example: Example) -> str:
    assert example.image is not None
    return example.image.digest


def _read_examples(table: Table, classes: int, task: str) -> list[Example]:
    """The rows, their images left where they lie: in the memory-mapped table."""
    from datasets import ClassLabel
    from datasets import Image as Column

    data = load_table(table, task)
    feature = data.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != classes:
        raise UsageError(
            f"Task {task!r}: {table} has {feature.num_classes} classes, the task is for {classes}; take the "
            "dataset that it was written for."
        )
    data = data.cast_column("image", Column(decode=False))
    found = []
    for row, label in enumerate(data["label"]):
        if not isinstance(label, int) or not 0 <= label < classes:
            raise UsageError(
                f"Task {task!r}: row {row} of {table} has label {label!r}, a class is a number from 0 to "
                f"{classes - 1}."
            )
        found.append(
            Example(
                "", str(label), image=Image(f"Row {row} of {table}", partial(_read_image_file, data, row))
            )
        )
    return found


def _read_image_file(data: Dataset, row: int) -> bytes:
    image = data[row]["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()
