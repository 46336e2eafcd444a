"""German Traffic Sign Recognition Benchmark (Stallkamp et al. 2011): which of 43 signs?

The hub's dataset has 26,640 training images (those of the competition's first round) and 12,630 for testing.
In both, many show one sign from ever nearer; validation and training share signs, but no image.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "tanganke/gtsrb"


class GTSRB(HubImageTask):
    name = "gtsrb"
    title = "traffic signs"
    floor = 1 / 43
    labels = numbered_classes(43)
    train_table = Table(DATA, "train", COLUMNS)
    test_table = Table(DATA, "test", COLUMNS)
    defaults = image_defaults(23_500, 2_400, 12_630)
