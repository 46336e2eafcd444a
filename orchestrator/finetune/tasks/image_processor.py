"""Images as a model's own processor makes them: its size, crop and colours, and nothing at random.

An image is decoded when its batch is next. What is kept are the latest few thousand, as 8-bit pixels, so that
a small set is decoded once; pixels become floats on the model's device.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.tasks.base import Image
from orchestrator.util.atomic_files import Damaged
from orchestrator.util.errors import BadInput

KEPT = 2048  # 224 x 224 in three colours: 300 MB
MOST_THREADS = 8  # of a process: there may be one a GPU


class ImageProcessor:
    """Stands where a tokenizer does for text. `own`: what transformers makes of preprocessor_config.json."""

    pad_token_id = 0  # of no use: images are of one size, and nothing is padded

    def __init__(self, own: Any) -> None:
        self.own = own
        self._kept: OrderedDict[Image, Future[Tensor]] = OrderedDict()
        # Pillow decodes and scales without Python's lock. Beside a GPU the cores are free, where Ray leaves
        # torch one of them; on CPUs they are the seats'.
        free = min(MOST_THREADS, len(os.sched_getaffinity(0))) if torch.cuda.is_available() else 1
        self._pool = ThreadPoolExecutor(max(free, torch.get_num_threads()), "images")

    @classmethod
    def of(cls, source: str, revision: str | None) -> ImageProcessor:
        """Of a folder or a hub repository. Pillow's arithmetic wherever it runs: torchvision, which
        transformers would take where it finds it, gives other pixels."""
        from transformers import AutoImageProcessor

        own = AutoImageProcessor.from_pretrained(
            source, revision=revision, backend="pil", trust_remote_code=False
        )
        return cls(own)

    def inputs(self, images: Sequence[Image], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, C, H, W), what the model is given. An image that is there several times (for several lanes) is
        decoded once."""
        place = {image: number for number, image in enumerate(dict.fromkeys(images))}
        begun = [self._begun(image) for image in place]
        pixels = torch.stack([each.result() for each in begun]).to(device)
        made = self.normalised(pixels).to(dtype)
        if len(place) == len(images):
            return made
        return made[torch.tensor([place[image] for image in images], device=device)]

    def normalised(self, pixels: Tensor) -> Tensor:
        """float32 as the model wants them, of 8-bit pixels (n, C, H, W)."""
        made = pixels.float()
        if self.own.do_rescale:
            made = made * self.own.rescale_factor
        if self.own.do_normalize:
            mean, std = (
                made.new_tensor(values).view(1, -1, 1, 1)
                for values in (self.own.image_mean, self.own.image_std)
            )
            made = (made - mean) / std
        return made

    def pixels(self, image: Image) -> Tensor:
        """(C, H, W) uint8. Raises BadInput for a file that is no image."""
        return self._begun(image).result()

    def soon(self, images: Iterable[Image]) -> None:
        """They will be asked for in this order: they are decoded beside what the device computes, as many of
        them as are kept. One more would push out the first before it is asked for."""
        for image in islice(dict.fromkeys(images), KEPT):
            self._begun(image)

    def _begun(self, image: Image) -> Future[Tensor]:
        found = self._kept.get(image)
        if found is None or (found.done() and found.exception() is not None):
            # What failed is tried again: there may have been too little memory.
            found = self._kept[image] = self._pool.submit(self._decoded, image)
        self._kept.move_to_end(image)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _decoded(self, image: Image) -> Tensor:
        import PIL.Image

        try:
            data = image.read()
        except Damaged as error:
            raise BadInput(f"{error}; remove the task's *.examples.arrow there.") from None
        try:
            opened = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        except PIL.UnidentifiedImageError:  # its own words name an address in memory
            raise BadInput(
                f"{image.name} is not an image that Pillow can read: of no kind it knows."
            ) from None
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            # What it raises for broken ones, and for one of more pixels than it takes.
            raise BadInput(f"{image.name} is not an image that Pillow can read: {error}.") from None
        made = self.own(opened, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(made).astype(np.uint8))
