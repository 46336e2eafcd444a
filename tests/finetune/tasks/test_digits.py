"""The local image task: its data and its base model."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.finetune.tasks.digits import (
    FINE_TUNING_DIGITS,
    NOISE_STD,
    PRETRAINING_DIGITS,
    RECIPE,
    Digits,
    _batches,
    _images_by_digit,
    _pretraining_data,
    processor,
)
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError

QUICK = replace(RECIPE, steps=3, batch_size=8, hidden_size=16, intermediate_size=32, layers=1, heads=2)


def test_splits_are_disjoint_and_balanced_and_the_floor_is_the_score_of_a_guess() -> None:
    task = Digits()
    data = task.load(task.choice())
    digests = [example.image.digest for split in SPLITS for example in data[split] if example.image]
    assert len(digests) == len(set(digests)) == sum(len(data[split]) for split in SPLITS)
    for split in SPLITS:
        shares = Counter(example.answer for example in data[split])
        assert set(shares) == set(task.labels) == set(FINE_TUNING_DIGITS)
        assert set(shares.values()) == {len(data[split]) // len(FINE_TUNING_DIGITS)}
    assert task.floor == 1 / len(task.labels)


def test_smaller_sizes_are_prefixes_and_too_large_ones_are_refused() -> None:
    task = Digits()
    small = task.load(replace(task.choice(), train_size=20, validation_size=30, test_size=10))
    large = task.load(task.choice())
    assert all(large[split][: len(small[split])] == small[split] for split in SPLITS)
    with pytest.raises(UsageError, match="281 are needed"):
        task.load(replace(task.choice(), validation_size=281))


def test_an_image_file_contains_the_pixels_of_scikit_learn() -> None:
    data = load_digits()
    for digit, images in _images_by_digit().items():
        for image in images[:3]:
            number = int(image.name.split()[1])
            assert str(data.target[number]) == digit
            opened = np.asarray(PIL.Image.open(io.BytesIO(image.read())))
            assert np.rint(opened / 255 * 16).tolist() == data.images[number].tolist()
            seen = processor().pixel_values([image], torch.device("cpu"), torch.float32)[0]
            expected = torch.tensor(data.images[number] / 8 - 1, dtype=torch.float32).expand(3, 8, 8)
            torch.testing.assert_close(
                seen, expected, rtol=0, atol=0.004
            )  # half of one of 256 shades of gray


def test_pretraining_uses_four_fifths_of_the_digits_0_to_4_only() -> None:
    seen, unseen = _pretraining_data(), _pretraining_data(held_out=True)
    assert len(seen[0]) + len(unseen[0]) == sum(
        len(_images_by_digit()[digit]) for digit in PRETRAINING_DIGITS
    )
    assert len(unseen[0]) / len(seen[0]) == pytest.approx(1 / 4, abs=0.06)
    recipe = replace(RECIPE, steps=4)
    # Every image of a batch is an allowed one, up to its shift and the noise.
    places = [(y, x) for y in range(3) for x in range(3)]
    wide = torch.nn.functional.pad(seen[0], (1, 1, 1, 1), value=-1.0)
    moved = torch.cat([wide[:, :, y : y + 8, x : x + 8] for y, x in places])
    digits = seen[1].repeat(len(places))
    for images, answers in _batches(recipe):
        apart = torch.cdist(images.flatten(1), moved.flatten(1)) / images[0].numel() ** 0.5
        nearest = apart.min(dim=1)
        assert torch.equal(digits[nearest.indices], answers)
        assert nearest.values.max() < 1.5 * NOISE_STD


def test_the_base_model_is_bit_identical_each_time_and_gets_a_head_of_zeros(tmp_path: Path) -> None:
    contents, lines = [], []
    for i, threads in enumerate((1, 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(i)
        contents.append(
            model_catalogue.prepare_task_base_model(Digits(QUICK), tmp_path / str(i), lines.append)
        )
    assert contents[0] == contents[1]
    assert "held-out images of 0 to 4 are correct" in lines[-1]
    assert base_store.base_folder(tmp_path / "0", "digits-base", contents[0]).is_dir()
    base_model = loading.load_base_model(
        ModelChoice("digits-base", contents[0]), tmp_path / "0", "cpu", Digits(QUICK)
    )
    assert base_model.head_names == ("classifier",)
    assert base_model.model.classifier.out_features == len(FINE_TUNING_DIGITS)
    assert not any(p.any() for p in base_model.model.classifier.parameters())
    assert sum(p.numel() for p in base_model.model.parameters()) < 2_000_000
