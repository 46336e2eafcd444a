"""The base class of image classification tasks on datasets of the hub: the published study's seven tasks.

Each dataset has the columns `image` and `label`, the index of a class. The test split is the whole published
test set. The validation split is a tenth of the training set, chosen by the hash of the image file. Training
images that also occur in the test set are left out, and duplicates in the training set count once.

From the paper (arXiv 2601.22708, section on images): CLIP ViT-B/16, top-1 accuracy, rank 8, ten learning
rates, everything else "identical to" its language tasks, which is AdamW, a cosine schedule, batches of 64,
and in the paper's scripts 3 % warm-up and weight decay 5e-4. The paper does not say how long it trains
(here 1,000 steps: one epoch of the largest dataset, 18 of the smallest), what the head reads (here the mean
of the patches, as in transformers' CLIPForImageClassification), or how images are prepared (here by CLIP's
processor, without augmentation).
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

HASH_BUCKETS = 10  # one of so many training images is for validation
COLUMNS = {"image": object, "label": int}
LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""The grid of the paper."""


def image_defaults(train: int, validation: int, test: int) -> TaskDefaults:
    """Return the settings that all image tasks share.

    Args:
        train: Training images.
        validation: Validation images.
        test: Test images.
    """
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
    """Return the names of classes that are called by their index.

    The number of classes has to be known before data are read; data with another number are refused.

    Args:
        classes: The number of classes.
    """
    return tuple(str(number) for number in range(classes))


class HubImageTask(Task):
    """Image classification on a dataset of the hub.

    A subclass sets the two tables, `labels`, `floor` (the mean share of a class) and `defaults`.
    """

    metric = "accuracy"
    default_model = "openai/clip-vit-base-patch16"
    inputs = "image"
    output = "classification"
    train_table: ClassVar[Table]
    test_table: ClassVar[Table]

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        found = _all_examples(
            self.train_table,
            self.test_table,
            len(self.labels),
            self.name,
            os.environ.get(DATA_FOLDER_VARIABLE),
        )[split]
        if count > len(found):
            raise UsageError(
                f"Task {self.name!r} has {len(found)} {split} examples in {self.train_table.repository}, "
                f"{count} are needed."
            )
        return list(found[:count])


@lru_cache(maxsize=8)
def _all_examples(
    train: Table, test: Table, classes: int, task: str, folder: str | None
) -> dict[Split, tuple[Example, ...]]:
    """Return the examples in the order of their hashes, since datasets are sorted by class.

    `folder` is the data folder that `load_table` uses; it is here as a key of the cache.
    """
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    found["test"] = _read_examples(test, classes, task)
    seen = {_digest(example) for example in found["test"]}
    for example in _read_examples(train, classes, task):
        if (digest := _digest(example)) not in seen:
            seen.add(digest)
            found[hash_split(digest, ("validation",), HASH_BUCKETS)].append(example)
    return {split: tuple(sorted(examples, key=_sort_key)) for split, examples in found.items()}


def _sort_key(example: Example) -> bytes:
    # Hashed again, since hash_split has selected by the first digits of the digest.
    return hashlib.sha256(_digest(example).encode()).digest()


def _digest(example: Example) -> str:
    assert example.image is not None
    return example.image.digest


def _read_examples(table: Table, classes: int, task: str) -> list[Example]:
    """Return the rows as examples whose images are read from the memory-mapped table when needed."""
    from datasets import ClassLabel
    from datasets import Image as Column

    data = load_table(table, task)
    feature = data.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != classes:
        raise UsageError(
            f"Task {task!r}: {table} has {feature.num_classes} classes, the task has {classes}; take the "
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
