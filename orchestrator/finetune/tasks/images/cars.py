"""Stanford Cars (Krause et al. 2013): 196 makes, models and years of cars.

It has 8,144 training and 8,041 test images.
"""

from orchestrator.finetune.tasks.hub_image_task import HubImageTask, image_defaults


class Cars(HubImageTask):
    """Classification of cars by make, model and year."""

    name = "cars"
    title = "makes of cars"
    floor = 1 / 196
    labels = tuple(map(str, range(196)))
    repository = "tanganke/stanford_cars"
    commit = "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"
    defaults = image_defaults(7_100, 700, 8_041)
