"""EuroSAT (Helber et al. 2019): ten kinds of land cover in satellite images of 64 x 64 pixels.

It has 27,000 images. The hub's dataset should have 21,600 training and 2,700 test images, which could not be
verified when this was written; that it has ten classes was verified.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class EuroSAT(HubImageTask):
    """Classification of satellite images by land cover."""

    name = "eurosat"
    title = "land seen by a satellite"
    floor = 1 / 10
    labels = tuple(map(str, range(10)))
    repository = "tanganke/eurosat"
    defaults = image_defaults(18_900, 1_900, 2_700)
