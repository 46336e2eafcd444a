"""Street View House Numbers (Netzer et al. 2011), cropped: the digit in the middle of 32 x 32 pixels.

It has 73,257 training and 26,032 test images; its `extra` images are not used.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class SVHN(HubImageTask):
    """Classification of digits of house numbers."""

    name = "svhn"
    title = "house numbers in the street"
    floor = 1 / 10
    labels = tuple(map(str, range(10)))
    repository = "ufldl-stanford/svhn"
    commit = "f9e1717d73324ebbc1ece84267ccd80d0aca0690"
    subset = "cropped_digits"
    defaults = image_defaults(64_500, 6_800, 26_032)
