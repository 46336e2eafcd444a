"""Preparation of images by a model's own processor: size, crop and colors, without augmentation.

Images are decoded shortly before their batch is needed. The last few thousand are cached as 8-bit pixels, so
that a small dataset is decoded once. Pixels are converted to floats on the model's device.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.process_group import copy_without_waiting
from orchestrator.finetune.tasks.base import Image

CACHE_SIZE = 2048  # images; 300 MB for three channels of 224 x 224 pixels
MAX_THREADS = 8  # per process, of which there may be one per GPU


class ImageProcessor:
    """The processor of a vision model, in place of a tokenizer.

    Args:
        hf_processor: The image processor of transformers.
    """

    pad_token_id = 0  # in place of a tokenizer's; images of one size need no padding

    def __init__(self, hf_processor: Any) -> None:
        self.hf_processor = hf_processor
        self._cache: OrderedDict[Image, Future[Tensor]] = OrderedDict()
        # Pillow decodes and scales without holding Python's lock. With a GPU all cores are free, though Ray
        # gives torch only one of them; without GPUs the cores belong to the trainers.
        decode_threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if torch.cuda.is_available() else 1
        self._pool = ThreadPoolExecutor(max(decode_threads, torch.get_num_threads()), "images")

    @classmethod
    def from_pretrained(cls, source: str, revision: str | None) -> ImageProcessor:
        """Load the processor of a model.

        Always uses the implementation with Pillow: the one with torchvision, which transformers prefers if
        torchvision is installed, computes other pixels.

        Args:
            source: A folder or a hub repository.
            revision: A commit of the repository.
        """
        # In transformers 5.16 and 5.17, the name in the package itself requires torchvision.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        options = {"revision": revision, "backend": "pil", "trust_remote_code": False}
        return cls(AutoImageProcessor.from_pretrained(source, **options))

    def pixel_values(self, images: Sequence[Image], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the model's input for images, of shape (n, C, H, W).

        An image that occurs several times, for several lanes, is decoded once.

        Args:
            images: The n images.
            device: The device of the result.
            dtype: The data type of the result.

        Raises:
            UsageError: A file is not an image.
        """
        positions = {image: number for number, image in enumerate(dict.fromkeys(images))}
        futures = [self._submit_decode(image) for image in positions]
        pixels = copy_without_waiting(torch.stack([each.result() for each in futures]), device)
        batch = self.normalize(pixels).to(dtype)
        if len(positions) == len(images):
            return batch
        numbers = torch.tensor([positions[image] for image in images])
        return batch.index_select(0, copy_without_waiting(numbers, device))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return rescaled and normalized pixels as float32.

        Args:
            pixels: 8-bit pixels of shape (n, C, H, W).
        """
        values = pixels.float()
        if self.hf_processor.do_rescale:
            values = values * self.hf_processor.rescale_factor
        if self.hf_processor.do_normalize:
            channels = self.hf_processor.image_mean, self.hf_processor.image_std
            on_cpu = torch.tensor(channels, dtype=values.dtype).view(2, 1, -1, 1, 1)
            mean, std = copy_without_waiting(on_cpu, values.device)
            values = (values - mean) / std
        return values

    def prefetch(self, images: Iterable[Image]) -> None:
        """Start to decode images in the background, as many of them as fit the cache.

        Args:
            images: The images in the order in which they will be needed.
        """
        for image in islice(dict.fromkeys(images), CACHE_SIZE):
            self._submit_decode(image)

    def _submit_decode(self, image: Image) -> Future[Tensor]:
        future = self._cache.get(image)
        if future is None or (future.done() and future.exception() is not None):
            # A failed image is tried again, since memory may have been short.
            future = self._cache[image] = self._pool.submit(self._decode, image)
        self._cache.move_to_end(image)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return future

    def _decode(self, image: Image) -> Tensor:
        prepared = self.hf_processor(
            image.decode().convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
        )
        return torch.from_numpy(np.ascontiguousarray(prepared["pixel_values"][0]).astype(np.uint8))
