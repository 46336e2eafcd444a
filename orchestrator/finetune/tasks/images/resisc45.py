"""RESISC45 (Cheng et al. 2017): 45 kinds of scenes in aerial images.

18,900 of its 31,500 images are for training and 6,300 for testing.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/resisc45"


class RESISC45(HubImageTask):
    """Classification of aerial images by scene."""

    name = "resisc45"
    title = "scenes seen from above"
    floor = 1 / 45
    labels = numbered_classes(45)
    train_table = Table(DATA, "train", COLUMNS)
    test_table = Table(DATA, "test", COLUMNS)
    defaults = image_defaults(16_600, 1_700, 6_300)
