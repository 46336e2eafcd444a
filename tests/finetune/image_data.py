"""Small folders with the data of the survey's seven image tasks, in the hub's schema."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image

from orchestrator.finetune.tasks.hub_tasks import ImageTask

CLASSES = {"cars": 196, "dtd": 47, "eurosat": 10, "gtsrb": 43, "resisc45": 45, "sun397": 397, "svhn": 10}
SHOWN = 3  # classes of the images in the folder, one color each
TRAIN, TEST = 120, 24
SUBSETS = """---
configs:
- config_name: {subset}
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""


def picture(seed: int, label: int) -> bytes:
    """Return an image of noise in the color of a class, with a random size and a format of the hub."""
    source = np.random.RandomState(seed)
    pixels = source.randint(0, 90, (*source.randint(20, 60, 2), 3), dtype=np.uint8)
    pixels[..., label] += 150
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG" if seed % 2 else "PNG")
    return file.getvalue()


def write(
    task: ImageTask,
    root: Path,
    classes: int | None = None,
    edit: Callable[[str, list[bytes], list[int]], None] = lambda split, files, labels: None,
) -> None:
    """Write a folder like `hf download --repo-type dataset`. Without `classes`, labels are plain numbers."""
    table = task.table("train", {})
    folder = root / table.repository
    (folder / "data").mkdir(parents=True)
    for split, size, seed in (("train", TRAIN, 0), ("test", TEST, 10_000)):
        labels = [number % SHOWN for number in range(size)]
        files = [picture(seed + number, label) for number, label in enumerate(labels)]
        edit(split, files, labels)
        names = datasets.ClassLabel(num_classes=classes) if classes else datasets.Value("int64")
        data = datasets.Dataset.from_dict(
            {"image": [{"bytes": file, "path": None} for file in files], "label": labels},
            features=datasets.Features({"image": datasets.Image(), "label": names}),
        )
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    if table.subset is not None:
        (folder / "README.md").write_text(SUBSETS.format(subset=table.subset))
