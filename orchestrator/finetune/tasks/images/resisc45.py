"""RESISC45 (Cheng et al. 2017): 45 kinds of scenes in aerial images.

18,900 of its 31,500 images are for training and 6,300 for testing.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class RESISC45(HubImageTask):
    """Classification of aerial images by scene."""

    name = "resisc45"
    title = "scenes seen from above"
    floor = 1 / 45
    labels = tuple(map(str, range(45)))
    repository = "tanganke/resisc45"
    defaults = image_defaults(16_600, 1_700, 6_300)
