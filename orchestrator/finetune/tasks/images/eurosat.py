"""EuroSAT (Helber et al. 2019): which of ten kinds of land does the satellite see, in 64 x 64 pixels?

27,000 images; the hub's dataset should have 21,600 for training and 2,700 for testing, which could not be
looked up when this was written (that it has ten classes could).
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImages, defaults, numbered

DATA = "tanganke/eurosat"


class EuroSAT(HubImages):
    name = "eurosat"
    title = "land seen by a satellite"
    floor = 1 / 10
    labels = numbered(10)
    train = Table(DATA, "train", COLUMNS)
    test = Table(DATA, "test", COLUMNS)
    defaults = defaults(18_900, 1_900, 2_700)
