"""SUN397 (Xiao et al. 2010): 397 kinds of scenes, from abbey to zoo.

The first of its ten partitions has 19,850 training and 19,850 test images, 50 of each class.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/sun397"
COMMIT = "9c4afd6174afa3974f209a0ef099dbbe244dfd27"


class SUN397(HubImageTask):
    """Classification of photos by scene."""

    name = "sun397"
    title = "scenes"
    floor = 1 / 397
    labels = numbered_classes(397)
    train_table = Table(DATA, "train", COLUMNS, revision=COMMIT)
    test_table = Table(DATA, "test", COLUMNS, revision=COMMIT)
    defaults = image_defaults(17_000, 1_700, 19_850)
