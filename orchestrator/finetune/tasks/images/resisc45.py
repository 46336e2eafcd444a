"""RESISC45 (Cheng et al. 2017): which of 45 scenes is seen from above?

18,900 training and 6,300 test images, of 31,500 in all.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImages, defaults, numbered

DATA = "tanganke/resisc45"


class RESISC45(HubImages):
    name = "resisc45"
    title = "scenes seen from above"
    floor = 1 / 45
    labels = numbered(45)
    train = Table(DATA, "train", COLUMNS)
    test = Table(DATA, "test", COLUMNS)
    defaults = defaults(16_600, 1_700, 6_300)
