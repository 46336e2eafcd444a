"""Small data and base models for all presets."""

from __future__ import annotations

from pathlib import Path

import encoders
import generation_data
import glue_data
import hub_folder
import image_data
import tiny_images
from configurations import shipped

from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.hub_tasks import ImageTask

SIZES = {
    "metamathqa": (100, 4, 6),
    "codefeedback": (600, 2, 1),
    **{
        f"glue_{name}": (glue_data.TRAIN - glue_data.VALIDATION - 4, glue_data.VALIDATION, glue_data.DEV)
        for name in glue_data.NAMES
    },
    **dict.fromkeys(image_data.CLASSES, (90, 5, image_data.TEST)),
}
"""Examples for training, validation and test in the folders, by task."""


def write(root: Path, preset: str) -> Path:
    """Write the data of a preset's tasks to a folder, and return it."""
    for task in shipped(preset).task or ():
        found = catalogue.get(task)
        if isinstance(found, ImageTask):
            image_data.write(found, root, image_data.CLASSES[task])
    if "glue" in preset:
        glue_data.glue(root)
    elif "humaneval" in preset:
        generation_data.codefeedback(root)
    else:
        generation_data.metamathqa(root)
    return root


def save_model(folder: Path, preset: str) -> Path:
    """Save a small base model of the kind that a preset names, and return its folder."""
    if "glue" in preset:
        return encoders.save("roberta", folder)
    return tiny_images.clip(folder) if "images" in preset else hub_folder.llama(folder)
