"""GLUE's nine tasks, on a folder with the hub's schema."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import encoders
import pytest
from glue_data import DEV, NAMES, TRAIN, VALIDATION, glue, rows, task_of
from hub_folder import configuration, small, write
from scripted import Script, leases, train

from orchestrator.finetune.models import loading
from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import hub_tasks
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, LRSchedule, OptimizerConfig
from orchestrator.util.errors import UsageError


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glue(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub_data_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use the folder in place of the hub, and reduce the tasks to its size."""
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(hub))
    for name in NAMES:
        small(task_of(name), monkeypatch, train=TRAIN - VALIDATION - 4, validation=VALIDATION, test=DEV)
    hub_tasks._load_splits.cache_clear()
    yield hub
    hub_tasks._load_splits.cache_clear()


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.save("roberta", tmp_path_factory.mktemp("roberta"))


# -- the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_test_split_is_the_dev_set_with_the_texts_of_the_hub(name: str, hub_data_folder: Path) -> None:
    task = task_of(name)
    found = task.examples("test", DEV)
    for example, row in zip(found, rows(task, DEV, 1), strict=True):
        texts = [row[column] for column in task.text_columns]
        assert [example.prompt, *([example.pair] if example.pair is not None else [])] == texts
        assert task.target(example) == pytest.approx(row["label"], abs=1e-6)


@pytest.mark.parametrize("name", ["cola", "mnli"])
def test_splits_share_no_text_and_keep_their_order_at_any_size(name: str, hub_data_folder: Path) -> None:
    task = task_of(name)
    data = task.load(task.choice())
    firsts = {split: {example.prompt for example in data[split]} for split in SPLITS}
    assert len(data["validation"]) == VALIDATION
    assert not firsts["train"] & firsts["validation"]
    assert [*task.examples("train", 10)] == data["train"][:10]
    everything = task.examples("train", TRAIN - VALIDATION)
    assert len(set(everything) | set(task.examples("validation", VALIDATION))) == TRAIN
    with pytest.raises(UsageError, match=r"'glue_.* has 40 test examples, 1000 are needed"):
        task.load(replace(task.choice(), test_size=1000))


def test_rows_of_a_premise_share_a_split_and_test_rows_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("mnli")
    train = [
        {"premise": f"premise {i}", "hypothesis": f"hypothesis {j}", "label": j, "idx": 3 * i + j}
        for i in range(40)
        for j in range(3)
    ]
    write(
        tmp_path, "nyu-mll/glue", {"train": train, "validation_matched": [train[4], train[77]]}, subset="mnli"
    )
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(tmp_path))
    small(task, monkeypatch, train=90, validation=20, test=2)
    data = task.load(task.choice())
    train_examples, validation = (task.examples(split, 120) for split in ("train", "validation"))
    assert {e.prompt for e in train_examples}.isdisjoint(e.prompt for e in validation)
    assert 20 <= len(validation) <= 22
    assert len(train_examples) + len(validation) == 118
    assert not {(e.prompt, e.pair) for e in (*train_examples, *validation)} & {
        (e.prompt, e.pair) for e in data["test"]
    }


# -- from the folder to the scores -----------------------------------------------------------------------

FEW = ("cola", "stsb")
"""Tasks with one text and with two, with classes and with values."""


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in FEW)]
)
def test_a_task_is_trained_from_a_folder_to_its_scores(
    name: str, hub_data_folder: Path, roberta: Path, store: Store
) -> None:
    task = task_of(name)
    settings: dict[str, Any] = {
        "batches": BatchConfig(16, 1, task.defaults.max_length),
        "optimizer": OptimizerConfig(5e-3),
    }
    settings["lr_schedule"] = LRSchedule(20, task.defaults.schedule)
    one = configuration(task, roberta, store.bases, **settings)
    load = partial(loading.load_base_model, root=store.bases, device="cpu")
    train(Script(leases([one])), store, load_base_model=lambda choice, task: load(choice, task=task))
    record = store.get(one.fingerprint)
    assert record is not None
    assert record.state == "finished", record.traceback
    assert record.steps == len(record.curve) == 20
    first, last = (sum(s.loss for s in part) for part in (record.curve[:5], record.curve[-5:]))
    assert last < first
    for split, size in (("validation", VALIDATION), ("test", DEV)):
        score = record.score(split)  # type: ignore[arg-type]
        assert score is not None
        assert (0 if task.floor else -1) <= score <= 1
        assert len(record.items[split].answers) == len(record.items[split].correct) == size
        if task.labels:
            assert record.baseline_scores[split]["loss"] == pytest.approx(math.log(len(task.labels)))
            assert set(record.items[split].answers) <= set(task.labels)
    # The floor is the score of the untrained head, which predicts class 0, or 0, for every text.
    share = sum(task.target(example) == 0 for example in task.examples("test", DEV)) / DEV
    untrained_score = share if task.metric == "accuracy" else 0
    assert record.baseline_scores["test"][task.metric] == pytest.approx(untrained_score)


def test_the_test_split_is_scored_at_every_evaluation_on_request_with_the_same_training(
    hub_data_folder: Path, roberta: Path, store: Store
) -> None:
    """The survey reports the best evaluation on the dev set. Training and last scores do not change."""
    task = task_of("rte")
    schedule = {"lr_schedule": LRSchedule(6, "linear"), "evaluations": 3}
    last = configuration(task, roberta, store.bases, **schedule)
    every = replace(last, test_evaluations="every")
    assert every.fingerprint != last.fingerprint
    assert every.group_key == last.group_key
    load = partial(loading.load_base_model, root=store.bases, device="cpu")
    train(Script(leases([last, every])), store, load_base_model=lambda choice, task: load(choice, task=task))
    one, other = store.get(last.fingerprint), store.get(every.fingerprint)
    assert one is not None
    assert other is not None
    assert [e.step for e in one.evaluations if e.split == "test"] == [6]
    assert [e.step for e in other.evaluations if e.split == "test"] == [2, 4, 6]
    assert [s.loss for s in one.curve] == [s.loss for s in other.curve]
    assert one.score("test") == other.score("test")
    assert one.items["test"] == other.items["test"]
