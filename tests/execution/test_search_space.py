"""Spaces of real variants and tasks, checked before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from configurations import read_configuration
from points import study_of
from resolved import bases, resolve_one_task

from orchestrator.execution.search import open_search
from orchestrator.finetune.resolve.templates import find_settings_error
from orchestrator.launch.plan import print_plan
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Space
from orchestrator.util.errors import UsageError

__all__ = ["bases"]


def resolved(bases: Path, task: str = "letters", **options: Any) -> tuple[list[Configuration], Space | None]:
    usual = {"task": (task,), "variants": ("lora", "hira"), "model": str(bases / task)}
    chosen, made = resolve_one_task(StudyOptions(**usual | options), bases)
    return made, chosen.space


ALL = (
    "lora",
    "rslora",
    "lora_plus",
    "dora",
    "hira",
    "pissa",
    "adalora",
    "vera",
    "lora_moe",
    "relora",
    "full",
)


@pytest.mark.parametrize("variant", ALL)
def test_every_point_of_a_wide_space_is_a_configuration_that_the_variant_takes(
    bases: Path, tmp_path: Path, variant: str
) -> None:
    words = ("rank=int:2:8", "alpha=log:1:64", "dropout=0:0.2", "beta2=0.9,0.99,0.999", "warmup=0:0.2")
    made, space = resolved(
        bases, variants=(variant,), search="qmc", space=(*words, "batch_size=8,16", "weight_decay=0:0.1")
    )
    assert space is not None
    search = open_search(tmp_path, "qmc", 16, {"letters": space}, made)
    assert len(search.configurations) == 16
    for configuration in search.configurations.values():
        assert find_settings_error(configuration) is None
        assert read_configuration(configuration.to_json()) == configuration


def test_a_plan_says_what_is_fixed_and_the_budget_of_each_variant(bases: Path, tmp_path: Path) -> None:
    typed: dict[str, Any] = {
        "search": "qmc",
        "variants": ("lora", "hira"),
        "space": ("rank=2,4", "lora.alpha=log:1:64"),
        "set": ("learning_rate=1e-2", "weight_decay=0.1"),
    }
    made, space = resolved(bases, **typed)
    assert space is not None
    search = open_search(tmp_path, "qmc", 16, {"letters": space}, made)
    options = StudyOptions(task=("letters",), **typed)
    wanted, store = list(search.configurations.values()), Store(tmp_path / "store")
    study = study_of(wanted, store, options, templates=tuple(made), search=search)
    print_plan(study)
    said = study.console.export_text()
    assert "Space, lora     16 points of rank=2,4 lora.alpha=log:1:64\n" in said
    assert "Space, hira     2 points of rank=2,4\n" in said
    assert "Learning rate   0.01\n" in said
    assert "Fixed           learning_rate=1e-2 weight_decay=0.1\n" in said
    assert "Configurations  18, of them 0 known" in said


def test_fixed_values_hold_for_a_grid_too(bases: Path) -> None:
    made, space = resolved(
        bases, variants=("lora", "lora-plus"), set=("lora-plus.ratio=4", "weight_decay=0.1")
    )
    assert space is None
    assert [c.variant.extra for c in made] == [{}, {"ratio": 4.0}]
    assert {c.optimizer.weight_decay for c in made} == {0.1}


def test_one_rate_is_no_range(bases: Path) -> None:
    made, space = resolved(bases, search="qmc", learning_rates=("1e-2",), space=("rank=2,4",))
    assert space is not None
    assert {d.name for dimensions in space.values() for d in dimensions} == {"rank"}
    assert {c.optimizer.learning_rate for c in made} == {1e-2}


SEARCH: dict[str, Any] = {"search": "optuna"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SEARCH | {"space": ("rank=8,64",)}, "rank 64 is larger than layer"),
        (SEARCH | {"space": ("rank=int:8:64",)}, "rank 64 is larger than layer"),
        (SEARCH | {"space": ("hira.alpha=4,8",)}, "hira has no 'alpha'"),
        (SEARCH | {"space": ("head_learning_rate=log:1e-4:1",)}, "task 'letters' has no head"),
        (SEARCH | {"variants": ("pissa",), "space": ("pissa.svd=exact,fst",)}, "fst"),
        (
            SEARCH | {"variants": ("lora_moe",), "space": ("lora_moe.experts=2,4", "lora_moe.top_k=0,4")},
            "top_k 4",
        ),
        (SEARCH | {"variants": ("lora_plus",), "space": ("lora_plus.ratio=0:16",)}, "ratio"),
        (SEARCH | {"accumulation": 3, "batch_size": 18, "space": ("batch_size=18,20",)}, "accumulation 3"),
        (SEARCH | {"accumulation": 2, "space": ("batch_size=int:8:32",)}, "take a choice of batch sizes"),
        (SEARCH | {"train_size": 200, "space": ("batch_size=16,512",)}, "512: must be 200 or less"),
        (SEARCH | {"learning_rates": ("1e-3",), "space": ("learning_rate=log:1e-3:1",)}, "take one"),
        (SEARCH | {"sampler": "cma-es", "set": ("learning_rate=1e-3",)}, "nothing numeric"),
        ({"search": "qmc", "learning_rates": ("1e-3",)}, "--search qmc: nothing varies"),
        ({"set": ("learning_rate=1e-3",)}, "a grid's rates are those of --learning-rates"),
        ({"set": ("lora.ratio=4",)}, "lora has no 'ratio'"),
        ({"variants": ("lora_plus",), "set": ("lora_plus.ratio=0",)}, "ratio"),
        ({"set": ("rank=9999",)}, "rank 9999 is larger than layer"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    bases: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(bases, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_may_be_searched_where_there_is_one(bases: Path) -> None:
    _, space = resolved(bases, "reviews", **SEARCH, space=("head_learning_rate=log:1e-4:1",))
    assert space is not None
    assert all("head_learning_rate" in {d.name for d in each} for each in space.values())


def test_a_fixed_value_that_a_variant_does_not_have_is_no_other_configuration(bases: Path) -> None:
    (usual,), _ = resolved(bases, variants=("hira",))
    (same,), _ = resolved(bases, variants=("hira",), set=("alpha=4",))
    assert same.fingerprint == usual.fingerprint
