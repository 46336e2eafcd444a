"""Models for images in the loop: a head per lane, and independence of the lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from pair import Scenario, play
from scripted import Script, configuration, leases, numbers_of, solo, train
from three_lanes import tokenized_split
from tiny_images import MAKE, choice, load
from transformers import AutoModel

from orchestrator.finetune.evaluation.evaluate import EvaluationResult, evaluate
from orchestrator.finetune.evaluation.generate import EvaluatedLanes
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.digits import Digits
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from variants import catalogue as variants
from variants.adapters import attach
from variants.api import Batching, VariantSettings
from variants.testing.rig import LAW_SETTINGS, ROUNDS_BY_SIZE

pytestmark = pytest.mark.xdist_group("pair")


# -- the model -------------------------------------------------------------------------------------------


def test_only_the_image_tower_is_loaded_and_it_gets_a_head_of_zeros(image_folder: Path) -> None:
    task = Digits()
    base_model = load(image_folder, task)
    assert base_model.head_names == ("classifier",)
    with base_store.suppress_transformers_logging():
        saved = AutoModel.from_pretrained(image_folder).state_dict()
    tower = {name.removeprefix("vit."): p for name, p in base_model.model.named_parameters()}
    assert not any(tower.pop(f"classifier.{part}").any() for part in ("weight", "bias"))
    for name, parameter in tower.items():  # the weights of the checkpoint, not random ones
        assert torch.equal(parameter, saved[name])
    others = {name.partition(".")[0] for name in set(saved) - set(tower) if "position_ids" not in name}
    clip_others = {"text_model", "text_projection", "visual_projection", "logit_scale"}
    assert others == (clip_others if base_model.model.config.model_type == "clip" else {"pooler"})
    skeleton, heads = loading.build_meta_model(choice(image_folder), image_folder, task)
    assert heads == base_model.head_names
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in base_model.model.named_parameters()
    }
    split = tokenized_split(task.examples("validation", 20), task, base_model.processor, 0)
    adapters = attach(
        base_model.model,
        variants.get("lora"),
        VariantSettings(rank=4, alpha=8.0),
        "blocks",
        base_model.head_names,
    )
    found = evaluate(base_model, task, split, EvaluatedLanes(adapters))[0]
    assert found.scores == {"loss": pytest.approx(math.log(5)), "accuracy": task.floor}


# -- training --------------------------------------------------------------------------------------------


def point(variant: str = "lora", **options: object) -> Configuration:
    alpha = 8.0 if variants.get(variant).uses_alpha else None
    one = configuration(task="digits", variant=variant, alpha=alpha, **options)  # type: ignore[arg-type]
    extra = {**variants.get(variant).extra_defaults, **LAW_SETTINGS.get(variant, {})}
    if "calibration_batches" in extra:
        extra["calibration_batches"] = 2
    return replace(one, variant=replace(one.variant, extra=extra))


FEW = [("lora", "clip"), ("head_only", "vit")]
MORE = [
    pytest.param(name, kind, marks=pytest.mark.slow if name in KINDS else pytest.mark.nightly)
    for name in variants.names()
    for kind in MAKE
    if (name, kind) not in FEW
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder that all models share.

    Its content is the same for all of them: images are stored as files, and heads of zeros give the same
    baseline scores.
    """
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("variant", "kind"), [*FEW, *MORE])
def test_a_lane_in_a_group_gets_the_numbers_of_a_lane_alone(
    variant: str, kind: str, image_folders: dict[str, Path], store: Store, tmp_path: Path, data: Path
) -> None:
    members = [
        point(variant, seed=0, steps=3),
        point(variant, seed=1, steps=4, rate=5e-3),
        point(variant, seed=1, steps=2),
    ]
    options = {"load_base_model": partial(_load, image_folders[kind]), "data": data}
    train(Script(leases(members), start_at={members[2].fingerprint: 1}), store, lanes=3, **options)
    for one in members:
        record = store.get(one.fingerprint)
        assert record is not None
        assert record.state == "finished", record.traceback
        is_grouped = variants.get(variant).batching is not Batching.EXCLUSIVE
        assert (record.provenance.lane_group_size > 1) == is_grouped
        alone = solo(one, tmp_path, **options)
        if variant in ROUNDS_BY_SIZE:
            losses = ([step.loss for step in each.curve] for each in (record, alone))
            assert next(losses) == pytest.approx(next(losses), rel=1e-4)
        else:
            assert numbers_of(record) == numbers_of(alone)
        assert record.baseline_scores["test"]["loss"] == pytest.approx(math.log(5))
        assert set(record.items["test"].answers) <= set(Digits.labels)


def _load(image_folder: Path, choice: ModelChoice, task: Task) -> BaseModel:
    return load(image_folder, task)


def _scenario(ones: list[Configuration], image_folder: Path, rank: int) -> Scenario:
    return Scenario(Script(leases(ones)), options={"load_base_model": partial(_load, image_folder)})


def _on_two(process_group: ProcessGroup, where: Path, image_folder: Path) -> list[EvaluationResult]:
    task = Digits()
    base_model = load(image_folder, task)
    split = tokenized_split(task.examples("validation", 90), task, base_model.processor, 0)
    with torch.no_grad():
        base_model.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    adapters = attach(
        base_model.model,
        variants.get("lora"),
        VariantSettings(rank=4, alpha=8.0),
        "blocks",
        base_model.head_names,
    )
    return evaluate(base_model, task, split, EvaluatedLanes(adapters), process_group)


def test_two_workers_split_images_like_texts(
    pair: Callable[..., Any], image_folders: dict[str, Path], tmp_path: Path
) -> None:
    score = partial(_on_two, image_folder=image_folders["clip"])
    ones = [point("lora", seed=seed, batch_size=7, accumulation=2, steps=4) for seed in range(2)]
    learn = partial(play, partial(_scenario, ones, image_folders["clip"]))
    found = pair({"score": score, "learn": learn}, tmp_path)
    assert found["score"][0] == found["score"][1] == score(SINGLE_PROCESS_GROUP, tmp_path)
    assert found["learn"][0].raised == ""
    for one in ones:
        together = Store(tmp_path / "learn").get(one.fingerprint)
        alone = solo(one, tmp_path, load_base_model=partial(_load, image_folders["clip"]))
        assert together is not None
        assert together.provenance.workers == 2
        assert [s.loss for s in together.curve] == pytest.approx([s.loss for s in alone.curve], rel=1e-4)
