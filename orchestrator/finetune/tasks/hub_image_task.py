"""The base class of image classification tasks on datasets of the hub: the published study's seven tasks.

Each dataset has the columns `image` and `label`, the index of a class. The test split is the whole published
test set. The validation split is a tenth of the training set, chosen by the hash of the image file. Training
images that also occur in the test set are left out, and duplicates in the training set count once.

From the paper (arXiv 2601.22708, section on images): CLIP ViT-B/16, top-1 accuracy, rank 8, ten learning
rates, everything else "identical to" its language tasks, which is AdamW, a cosine schedule, batches of 64,
and in the paper's scripts 3 % warm-up and weight decay 5e-4. The paper does not give the number of steps
(here 1,000: one epoch of the largest dataset, 20 of the smallest), the input of the head (here the mean of
the patches, as in transformers' CLIPForImageClassification), or the preparation of images (here by CLIP's
processor, without augmentation).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from orchestrator.finetune.sources.data_files import find_cell_problem
from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, CellType, Table, load_table
from orchestrator.finetune.tasks.base import Example, Image, Split, Task, TaskDefaults, hash_split
from orchestrator.finetune.tasks.examples import hash_text
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

HASH_BUCKETS = 10  # one of these buckets is the validation split
LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""The grid of the paper."""


image_defaults = partial(
    TaskDefaults,
    steps=1000,
    batch_size=64,
    max_length=0,
    evaluations=4,
    learning_rates=LEARNING_RATES,
    warmup=0.03,
    weight_decay=5e-4,
)
"""Function that returns the settings of an image task. Its arguments are the numbers of training, validation
and test images."""


class HubImageTask(Task):
    """Image classification on a dataset of the hub.

    A subclass sets `repository`, `labels` (the classes are called by their index), `floor` (the mean share of
    a class) and `defaults`.
    """

    metric = "accuracy"
    default_model = "openai/clip-vit-base-patch16"
    inputs = "image"
    output = "classification"
    repository: ClassVar[str]
    """The dataset on the hub: `organization/dataset`."""
    commit: ClassVar[str | None] = None
    """The commit of the dataset; None for the newest one when the task is first used in a store."""
    subset: ClassVar[str | None] = None
    """The configuration of the dataset, if it has several."""

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return _all_examples(self, os.environ.get(DATA_FOLDER_VARIABLE))[split][:count]


@lru_cache(maxsize=8)
def _all_examples(task: HubImageTask, folder: str | None) -> dict[Split, list[Example]]:
    """Return the examples in the order of their hashes, since datasets are sorted by class.

    `folder` is the data folder that `load_table` uses; it is here as a key of the cache.
    """
    labeled: dict[Split, list[tuple[Image, str]]] = {
        "train": [],
        "validation": [],
        "test": list(_read_images(task, "test")),
    }
    digests = {image.digest for image, _ in labeled["test"]}
    for image, label in _read_images(task, "train"):
        if image.digest not in digests:
            digests.add(image.digest)
            labeled[hash_split(image.digest, ("validation",), HASH_BUCKETS)].append((image, label))
    for pairs in labeled.values():
        # Hashed again, since hash_split has selected by the first digits of the digest.
        pairs.sort(key=lambda pair: hash_text(pair[0].digest))
    return {s: [Example("", label, image=image) for image, label in labeled[s]] for s in labeled}


def _read_images(task: HubImageTask, split: Split) -> Iterator[tuple[Image, str]]:
    """Yield images, which are read from the memory-mapped table when needed, and their classes."""
    from datasets import ClassLabel
    from datasets import Image as Column

    columns: dict[str, CellType] = {"image": object, "label": int}
    table = Table(task.repository, split, columns, task.subset, task.commit)
    data = load_table(table, task.name)
    feature = data.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != len(task.labels):
        raise UsageError(
            f"Task {task.name!r}: {table} has {feature.num_classes} classes, the task has "
            f"{len(task.labels)}; take the dataset that it was written for."
        )
    data = data.cast_column("image", Column(decode=False))
    classes = range(len(task.labels))
    for row, label in enumerate(data["label"]):
        if problem := find_cell_problem(label, classes):
            raise UsageError(f"Task {task.name!r}: row {row} of {table}: 'label' {problem}.")
        yield Image(f"Row {row} of {table}", partial(_read_image_file, data, row)), str(label)


def _read_image_file(data: Dataset, row: int) -> bytes:
    image = data[row]["image"]
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
