"""Stanford Cars (Krause et al. 2013): 196 makes, models and years of cars.

It has 8,144 training and 8,041 test images.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/stanford_cars"
COMMIT = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"


class Cars(HubImageTask):
    """Classification of cars by make, model and year."""

    name = "cars"
    title = "makes of cars"
    floor = 1 / 196
    labels = numbered_classes(196)
    train_table = Table(DATA, "train", COLUMNS, revision=COMMIT)
    test_table = Table(DATA, "test", COLUMNS, revision=COMMIT)
    defaults = image_defaults(7_100, 700, 8_041)
