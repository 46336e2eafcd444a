"""Handwritten digits: an image classification task on real images that is small enough for two cores.

The data are scikit-learn's 1,797 digits (8 x 8 pixels, 17 shades of gray; UCI's Optical Recognition of
Handwritten Digits). The base model, a small ViT, is pretrained on the digits 0 to 4. Fine-tuning trains it
with a new head on the digits 5 to 9, whose images are divided equally among training, validation and test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.tasks.base import SPLITS, Example, Image, Split, hash_split
from orchestrator.finetune.tasks.examples import hash_text
from orchestrator.finetune.tasks.pretraining import PretrainedTask, Recipe

if TYPE_CHECKING:
    import torch

    from orchestrator.finetune.tasks.image_processor import ImageProcessor

IMAGE_SIZE, MAX_GREY, PATCH_SIZE = 8, 16, 2
PRETRAINING_DIGITS, FINE_TUNING_DIGITS = ("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")
NOISE_STD = 0.2
"""Standard deviation of the noise in pretraining; pixels are in [-1, 1]."""
RECIPE = Recipe(steps=1200, batch_size=64, learning_rate=1.5e-3, layers=4)


class Digits(PretrainedTask, entry="digits"):
    """Classification of the digits 5 to 9."""

    labels = FINE_TUNING_DIGITS
    recipe = RECIPE
    recipe_constants = (IMAGE_SIZE, PATCH_SIZE, NOISE_STD)

    def examples(self, split: Split, count: int) -> list[Example]:
        return _fine_tuning_examples()[split][:count]

    def processor(self) -> Any:
        return processor().hf_processor

    def base_config(self) -> Any:
        from transformers import ViTConfig

        return ViTConfig(**self.recipe.model_sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)

    def train_base(self, progress: Callable[[str], None]) -> Any:
        import torch
        from torch.nn.functional import cross_entropy
        from transformers import ViTForImageClassification

        config = self.base_config()
        config.num_labels = len(PRETRAINING_DIGITS)
        model = ViTForImageClassification(config)

        def compute_loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            pixels, digits = batch
            logits = model(pixel_values=pixels).logits
            return cross_entropy(logits, digits, label_smoothing=self.recipe.label_smoothing)

        self.fit(model, _batches(self.recipe), compute_loss, progress)
        images, digits = _pretraining_data(held_out=True)
        with torch.no_grad():
            num_correct = (model(pixel_values=images).logits.argmax(dim=1) == digits).sum().item()
        line = f"{num_correct} of {len(digits)} held-out images of 0 to 4 are correct"
        progress(f"pretraining digits-base: {line}")
        return model.vit


def processor() -> ImageProcessor:
    """Return the base model's image processor, which scales pixels to [-1, 1] and changes nothing else."""
    from transformers import ViTImageProcessorPil

    from orchestrator.finetune.tasks.image_processor import ImageProcessor

    half = [0.5, 0.5, 0.5]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ImageProcessor(ViTImageProcessorPil(size=size, do_resize=False, image_mean=half, image_std=half))


@lru_cache(maxsize=1)
def _images_by_digit() -> dict[str, tuple[Image, ...]]:
    """Return the distinct images of each digit, in the order of their hashes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    found: dict[str, dict[str, Image]] = {digit: {} for digit in (*PRETRAINING_DIGITS, *FINE_TUNING_DIGITS)}
    for number, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        # PGM, whose bytes are the pixels; those of a PNG depend on the library that compresses them.
        file = b"P5 %d %d %d\n" % (IMAGE_SIZE, IMAGE_SIZE, MAX_GREY) + pixels.astype("uint8").tobytes()
        image = Image(f"image {number} of scikit-learn's digits", partial(bytes, file))
        found[str(digit)].setdefault(image.digest, image)
    return {d: tuple(images[k] for k in sorted(images, key=hash_text)) for d, images in found.items()}


@lru_cache(maxsize=1)
def _fine_tuning_examples() -> dict[Split, list[Example]]:
    """Return the examples of each split; the classes take turns, so that all have equal shares."""
    by_split: dict[Split, list[list[Example]]] = {split: [] for split in SPLITS}
    for digit in FINE_TUNING_DIGITS:
        for split, by_digit in by_split.items():
            own = [i for i in _images_by_digit()[digit] if hash_split(i.digest, num_buckets=3) == split]
            by_digit.append([Example("", digit, image=image) for image in own])
    return {s: [*chain.from_iterable(zip(*by_digit, strict=False))] for s, by_digit in by_split.items()}


def _batches(recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield images (batch, 3, 8, 8), shifted by up to one pixel and with noise, and their classes (batch,).

    A class is an index of PRETRAINING_DIGITS.
    """
    import torch
    from torch.nn.functional import pad

    images, digits = _pretraining_data()
    padded = pad(images, (1, 1, 1, 1), value=float(images.min()))
    for _ in range(recipe.steps):
        drawn = torch.randint(len(images), (recipe.batch_size,))
        corners = torch.randint(3, (recipe.batch_size, 2)).tolist()
        shifted = torch.empty(recipe.batch_size, *images.shape[1:])
        for row, (number, (y, x)) in enumerate(zip(drawn, corners, strict=True)):
            shifted[row] = padded[number, :, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
        yield shifted + NOISE_STD * torch.randn_like(shifted[:, :1]), digits[drawn]


def _pretraining_data(held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of the digits 0 to 4 and their classes: four fifths of them, or the held-out fifth."""
    import torch

    chosen = [
        (image, number)
        for number, digit in enumerate(PRETRAINING_DIGITS)
        for image in _images_by_digit()[digit]
        if (hash_split(image.digest, ("test",)) == "test") == held_out
    ]
    images = processor().pixel_values([image for image, _ in chosen], torch.device("cpu"), torch.float32)
    return images, torch.tensor([number for _, number in chosen])
