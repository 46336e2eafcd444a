"""German Traffic Sign Recognition Benchmark (Stallkamp et al. 2011): 43 traffic signs.

The hub's dataset has 26,640 training images (those of the competition's first round) and 12,630 for testing.
Both contain series of images of one sign. Validation and training share signs, but no images.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class GTSRB(HubImageTask):
    """Classification of traffic signs."""

    name = "gtsrb"
    title = "traffic signs"
    floor = 1 / 43
    labels = tuple(map(str, range(43)))
    repository = "tanganke/gtsrb"
    defaults = image_defaults(23_500, 2_400, 12_630)
