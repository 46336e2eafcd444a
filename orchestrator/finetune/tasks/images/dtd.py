"""Describable Textures (Cimpoi et al. 2014): 47 words for textures, such as bubbly or knitted.

The first of its ten splits has 3,760 training images (with its validation set) and 1,880 test images. It
could not be verified, when this was written, that the hub's dataset has the same numbers.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class DTD(HubImageTask):
    """Classification of textures by the word that describes them."""

    name = "dtd"
    title = "describable textures"
    floor = 1 / 47
    labels = tuple(map(str, range(47)))
    repository = "tanganke/dtd"
    defaults = image_defaults(3_200, 300, 1_880)
