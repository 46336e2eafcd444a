"""Preparation of images: pixels, decoding in the background, rows and batches."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tiny_images import SIDE

from orchestrator.finetune.data.batches import (
    Batch,
    compute_max_row_length,
    encode_examples,
    make_training_batch,
    pad_rows,
)
from orchestrator.finetune.evaluation.evaluate import plan_batches
from orchestrator.finetune.tasks.base import Image
from orchestrator.finetune.tasks.digits import Digits
from orchestrator.finetune.tasks.image_processor import ImageProcessor


def photo(seed: int, width: int = 50, height: int = 37, mode: str = "RGB") -> Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return Image(f"photo {seed}", partial(bytes, file.getvalue()))


# -- pixels ----------------------------------------------------------------------------------------------


def test_pixels_equal_those_of_the_models_own_processor(image_folder: Path) -> None:
    image_processor = ImageProcessor.from_pretrained(str(image_folder), None)
    photos = [photo(0), photo(1, 20, 90), photo(2, mode="L"), photo(3, mode="P")]
    pixels = image_processor.pixel_values(photos, torch.device("cpu"), torch.float32)
    opened = [PIL.Image.open(io.BytesIO(p.read())).convert("RGB") for p in photos]
    assert pixels.shape == (4, 3, SIDE, SIDE)
    torch.testing.assert_close(
        pixels, image_processor.hf_processor(opened, return_tensors="pt")["pixel_values"], rtol=0, atol=1e-6
    )


# -- data ------------------------------------------------------------------------------------------------


def test_rows_and_batches_contain_files_but_no_pixels() -> None:
    task = Digits()
    examples = task.examples("train", 24)
    rows = encode_examples(examples, task, None, 0)
    assert [(r.ids, r.targets, r.image) for r in rows] == [
        ((), (task.labels.index(e.answer),), e.image) for e in examples
    ]
    batch = make_training_batch(
        rows, seed=3, start=20, count=8, max_row_length=compute_max_row_length(task, 0), pad_token_id=0
    )
    assert (batch.length, batch.target_counts, batch.attention_mask.numel()) == (0, (1,) * 8, 0)
    image_folders = Batch.concatenate([batch, pad_rows(rows[:4], 0, 0)])
    assert image_folders.images == (*batch.images, *(e.image for e in examples[:4]))
    assert torch.equal(image_folders.targets[8:], pad_rows(rows[:4], 0, 0).targets)
    plan = plan_batches([0] * 130, 0)
    assert [length for length, _ in plan] == [0, 0, 0]
    assert [item for _, items in plan for item in items] == list(range(130))
