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
from orchestrator.util.atomic_files import DamagedFileError
from orchestrator.util.errors import UsageError

CACHE_SIZE = 2048  # 224 x 224 in three colours: 300 MB
MAX_THREADS = 8  # of a process: there may be one a GPU


class ImageProcessor:
    """Stands where a tokenizer does for text. `own`: what transformers makes of preprocessor_config.json."""

    pad_token_id = 0  # of no use: images are of one size, and nothing is padded

    def __init__(self, hf_processor: Any) -> None:
        self.hf_processor = hf_processor
        self._cache: OrderedDict[Image, Future[Tensor]] = OrderedDict()
        # Pillow decodes and scales without Python's lock. Beside a GPU the cores are free, where Ray leaves
        # torch one of them; on CPUs they are the seats'.
        decode_threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if torch.cuda.is_available() else 1
        self._pool = ThreadPoolExecutor(max(decode_threads, torch.get_num_threads()), "images")

    @classmethod
    def from_pretrained(cls, source: str, revision: str | None) -> ImageProcessor:
        """Of a folder or a hub repository. Pillow's arithmetic wherever it runs: torchvision, which
        transformers would take where it finds it, gives other pixels."""
        from transformers import AutoImageProcessor

        hf_processor = AutoImageProcessor.from_pretrained(
            source, revision=revision, backend="pil", trust_remote_code=False
        )
        return cls(hf_processor)

    def pixel_values(self, images: Sequence[Image], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, C, H, W), what the model is given. An image that is there several times (for several lanes) is
        decoded once."""
        positions = {image: number for number, image in enumerate(dict.fromkeys(images))}
        futures = [self._submit_decode(image) for image in positions]
        pixels = torch.stack([each.result() for each in futures]).to(device)
        batch = self.normalize(pixels).to(dtype)
        if len(positions) == len(images):
            return batch
        return batch[torch.tensor([positions[image] for image in images], device=device)]

    def normalize(self, pixels: Tensor) -> Tensor:
        """float32 as the model wants them, of 8-bit pixels (n, C, H, W)."""
        made = pixels.float()
        if self.hf_processor.do_rescale:
            made = made * self.hf_processor.rescale_factor
        if self.hf_processor.do_normalize:
            mean, std = (
                made.new_tensor(values).view(1, -1, 1, 1)
                for values in (self.hf_processor.image_mean, self.hf_processor.image_std)
            )
            made = (made - mean) / std
        return made

    def decode(self, image: Image) -> Tensor:
        """(C, H, W) uint8. Raises BadInput for a file that is no image."""
        return self._submit_decode(image).result()

    def prefetch(self, images: Iterable[Image]) -> None:
        """They will be asked for in this order: they are decoded beside what the device computes, as many of
        them as are kept. One more would push out the first before it is asked for."""
        for image in islice(dict.fromkeys(images), CACHE_SIZE):
            self._submit_decode(image)

    def _submit_decode(self, image: Image) -> Future[Tensor]:
        future = self._cache.get(image)
        if future is None or (future.done() and future.exception() is not None):
            # What failed is tried again: there may have been too little memory.
            future = self._cache[image] = self._pool.submit(self._decode, image)
        self._cache.move_to_end(image)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return future

    def _decode(self, image: Image) -> Tensor:
        import PIL.Image

        try:
            data = image.read()
        except DamagedFileError as error:
            raise UsageError(f"{error}; remove the task's *.examples.arrow there.") from None
        try:
            opened = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        except PIL.UnidentifiedImageError:  # its own words name an address in memory
            raise UsageError(
                f"{image.name} is not an image that Pillow can read: of no kind it knows."
            ) from None
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            # What it raises for broken ones, and for one of more pixels than it takes.
            raise UsageError(f"{image.name} is not an image that Pillow can read: {error}.") from None
        pixels = self.hf_processor(opened, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return torch.from_numpy(np.ascontiguousarray(pixels).astype(np.uint8))
