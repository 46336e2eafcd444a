"""Image classification on datasets of the hub with the columns `image` and `label`, the index of a class.

The test split is the whole published test set. The validation split is a tenth of the training set, chosen
by the hash of the image file. Training images that also occur in the test set are left out, and duplicates in
the training set count once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.sources.data_files import find_cell_problem
from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, load_table
from orchestrator.finetune.tasks.base import Example, Image, Split, hash_split
from orchestrator.finetune.tasks.examples import hash_text
from orchestrator.finetune.tasks.hub_task import HubTask
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

HASH_BUCKETS = 10  # one of these buckets is the validation split


class ImageTask(HubTask):
    """Image classification; the classes are called by their index.

    `floor` is the mean share of a class, unless the entry says otherwise.
    """

    keys = (*HubTask.keys, "test_split", "classes")
    inputs = "image"
    output = "classification"
    classes: int

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.labels = tuple(map(str, range(settings["classes"])))
        self.floor = 1 / max(1, len(self.labels))
        super().__init__(name, settings)

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return _all_examples(self, os.environ.get(DATA_FOLDER_VARIABLE))[split][:count]


@lru_cache(maxsize=8)
def _all_examples(task: ImageTask, folder: str | None) -> dict[Split, list[Example]]:
    """Return the examples in the order of their hashes, since datasets are sorted by class.

    `folder` is the data folder that `load_table` uses; it is here as a key of the cache.
    """
    labeled: dict[Split, list[tuple[Image, str]]] = {
        "train": [],
        "validation": [],
        "test": list(_read_images(task, task.test_split)),
    }
    digests = {image.digest for image, _ in labeled["test"]}
    for image, label in _read_images(task, task.train_split):
        if image.digest not in digests:
            digests.add(image.digest)
            labeled[hash_split(image.digest, ("validation",), HASH_BUCKETS)].append((image, label))
    for pairs in labeled.values():
        # Hashed again, since hash_split has selected by the first digits of the digest.
        pairs.sort(key=lambda pair: hash_text(pair[0].digest))
    return {s: [Example("", label, image=image) for image, label in labeled[s]] for s in labeled}


def _read_images(task: ImageTask, split: str) -> Iterator[tuple[Image, str]]:
    """Yield images, which are read from the memory-mapped table when needed, and their classes."""
    from datasets import ClassLabel
    from datasets import Image as Column

    table = task.table(split, {"image": object, "label": int})
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
