"""EuroSAT (Helber et al. 2019): which of ten kinds of land does the satellite see, in 64 x 64 pixels?

27,000 images; the hub's dataset should have 21,600 for training and 2,700 for testing, which could not be
looked up when this was written (that it has ten classes could).
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/eurosat"


class EuroSAT(HubImageTask):
    name = "eurosat"
    title = "land seen by a satellite"
    floor = 1 / 10
    labels = numbered_classes(10)
    train_table = Table(DATA, "train", COLUMNS)
    test_table = Table(DATA, "test", COLUMNS)
    defaults = image_defaults(18_900, 1_900, 2_700)
