"""The seven image tasks of the hub, end to end, on folders with the hub's schema.

The model is a small CLIP with random weights, and in one case a ViT.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from hub_folder import configuration, small
from image_data import CLASSES, TEST, TRAIN, picture, write
from scripted import Script, leases, train
from tiny_images import MAKE, load

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.finetune.tasks.hub_tasks import ImageTask, _all_examples
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, LRSchedule, OptimizerConfig
from orchestrator.util.errors import UsageError


def task_of(name: str) -> ImageTask:
    task = catalogue.get(name)
    assert isinstance(task, ImageTask)
    return task


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _all_examples.cache_clear()
    return tmp_path / "data"


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKE.items()}


FEW = [("svhn", "clip")]
MORE = [pytest.param(name, "clip", marks=pytest.mark.slow) for name in CLASSES if name != "svhn"]
MORE.append(pytest.param("eurosat", "vit", marks=pytest.mark.slow))


@pytest.mark.parametrize(("name", "kind"), [*FEW, *MORE])
def test_end_to_end(
    name: str,
    kind: str,
    root: Path,
    models_of: dict[str, Path],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, folder = task_of(name), models_of[kind]
    write(task, root, CLASSES[name])
    small(task, monkeypatch, 90, 5, TEST)
    one = configuration(
        task,
        folder,
        store.bases,
        optimizer=OptimizerConfig(5e-3, weight_decay=task.defaults.weight_decay),
        lr_schedule=LRSchedule(20, task.defaults.schedule, task.defaults.warmup),
        batches=BatchConfig(16, 1, task.defaults.max_length),
    )
    source = Script(leases([one]))
    train(source, store, lanes=1, load_base_model=lambda _, task: load(folder, task))
    record = store.get(one.fingerprint)
    assert record is not None
    assert record.state == "finished", record.traceback
    assert record.baseline_scores["test"]["loss"] == pytest.approx(math.log(CLASSES[name]))
    scores = {e.split: e.scores for e in record.evaluations if e.step == 20}
    assert scores["test"]["loss"] < 0.9 * math.log(CLASSES[name])
    items = record.items["test"]
    truth = [e.answer for e in task.examples("test", TEST)]
    right = [float(a == b) for a, b in zip(items.answers, truth, strict=True)]
    assert list(items.correct) == right
    assert scores["test"]["accuracy"] == pytest.approx(np.mean(right))
    assert [report.step for report in source.reports] == [10, 20]


def test_splits_share_no_image_and_contain_the_whole_published_test_set(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("dtd")

    def repeat(split: str, files: list[bytes], labels: list[int]) -> None:
        """Repeat images: two test images in the training set, one training image and one test image twice."""
        if split == "train":
            files[:2] = [picture(10_000, 0), picture(10_001, 1)]
            files[5] = files[4]
        else:
            files[7] = files[6]

    write(task, root, CLASSES["dtd"], repeat)
    everything = _all_examples(task, str(root))
    digests = {split: [e.image.digest for e in everything[split] if e.image] for split in SPLITS}
    assert len(digests["test"]) == TEST
    assert len(digests["train"]) + len(digests["validation"]) == TRAIN - 3
    assert len(digests["validation"]) > 2
    assert not set(digests["train"]) & set(digests["validation"])
    assert not set(digests["test"]) & {*digests["train"], *digests["validation"]}
    assert {e.answer for e in task.examples("test", 12)} == {"0", "1", "2"}  # not sorted by class
    assert task.examples("train", 20) == task.examples("train", 30)[:20]
    small(task, monkeypatch, 90, 5, TEST)
    with pytest.raises(UsageError, match=r"'dtd' has \d+ validation examples, 400 are needed"):
        task.load(replace(task.choice(), validation_size=400))


def test_an_image_that_cannot_be_decoded_is_named_with_its_row(
    root: Path, models_of: dict[str, Path]
) -> None:
    def broken(split: str, files: list[bytes], labels: list[int]) -> None:
        if split == "test":
            files[3] = b"not an image"

    task = task_of("dtd")
    write(task, root, CLASSES["dtd"], broken)
    base_model = load(models_of["clip"], task)
    images = [e.image for e in task.examples("test", TEST) if e.image is not None]
    with pytest.raises(
        UsageError, match=r"Row 3 of tanganke/dtd \(test\) is not an image that Pillow can read"
    ):
        base_model.processor.pixel_values(images, base_model.device, base_model.model.dtype)
