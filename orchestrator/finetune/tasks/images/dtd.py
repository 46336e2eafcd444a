"""Describable Textures (Cimpoi et al. 2014): which of 47 words, bubbly or knitted, describes the texture?

By the first of its ten splits 3,760 training (with its validation) and 1,880 test images; that the hub's
dataset has so many could not be looked up when this was written.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/dtd"


class DTD(HubImageTask):
    name = "dtd"
    title = "describable textures"
    floor = 1 / 47
    labels = numbered_classes(47)
    train_table = Table(DATA, "train", COLUMNS)
    test_table = Table(DATA, "test", COLUMNS)
    defaults = image_defaults(3_200, 300, 1_880)
