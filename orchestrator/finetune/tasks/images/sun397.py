"""SUN397 (Xiao et al. 2010): 397 kinds of scenes, from abbey to zoo.

The first of its ten partitions has 19,850 training and 19,850 test images, 50 of each class.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class SUN397(HubImageTask):
    """Classification of photos by scene."""

    name = "sun397"
    title = "scenes"
    floor = 1 / 397
    labels = tuple(map(str, range(397)))
    repository = "tanganke/sun397"
    commit = "9c4afd6174afa3974f209a0ef099dbbe244dfd27"
    defaults = image_defaults(17_000, 1_700, 19_850)
