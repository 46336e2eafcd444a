"""Street View House Numbers (Netzer et al. 2011), cropped: the digit in the middle of 32 x 32 pixels.

It has 73,257 training and 26,032 test images; its `extra` images are not used.
"""

from __future__ import annotations

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.hub_image_task import COLUMNS, HubImageTask, image_defaults, numbered_classes

DATA = "ufldl-stanford/svhn"
COMMIT = "f9e1717d73324ebbc1ece84267ccd80d0aca0690"


class SVHN(HubImageTask):
    """Classification of digits of house numbers."""

    name = "svhn"
    title = "house numbers in the street"
    floor = 1 / 10
    labels = numbered_classes(10)
    train_table = Table(DATA, "train", COLUMNS, subset="cropped_digits", revision=COMMIT)
    test_table = Table(DATA, "test", COLUMNS, subset="cropped_digits", revision=COMMIT)
    defaults = image_defaults(64_500, 6_800, 26_032)
