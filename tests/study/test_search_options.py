"""The options of a search: defaults, and options that are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError


@pytest.mark.parametrize(
    ("options", "method", "seeds", "points"),
    [
        ({}, "grid", 3, 16),
        ({"seeds": 2}, "grid", 2, 16),
        ({"search": "optuna"}, "tpe", 1, 16),
        ({"search": "optuna", "sampler": "cma-es", "points": 40}, "cma-es", 1, 40),
        ({"search": "optuna", "sampler": "qmc"}, "qmc", 1, 16),
        ({"search": "random", "seeds": 1}, "random", 1, 16),
    ],
)
def test_defaults(options: dict[str, Any], method: str, seeds: int, points: int) -> None:
    typed = StudyOptions(**options)
    assert (typed.search_method, typed.seed_count, typed.point_count) == (method, seeds, points)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"search": "optun"}, "--search 'optun' is not one. Did you mean 'optuna'?"),
        ({"search": "optuna", "sampler": "cmaes"}, "--sampler 'cmaes' is not one. Did you mean 'cma-es'?"),
        ({"search": "qmc", "sampler": "tpe"}, "--sampler tpe: it is for --search optuna, not qmc"),
        ({"sampler": "tpe"}, "it is for --search optuna, not grid"),
        ({"search": "optuna", "scheduler": "hyperband"}, "compares brackets that are full"),
        ({"points": 8}, "--points is for a search; take --search qmc"),
        ({"space": ("rank=4,8",)}, "--space is for a search"),
        ({"search": "qmc", "points": 0}, "--points 0: must be 1 or more"),
        ({"search": "qmc", "points": 100_000}, "--points 100000: must be 10000 or less; take 10000"),
        ({"rank": 4, "set": ("rank=16",)}, "--set 'rank=16' and --rank both set rank; take one"),
        ({"rank": 16, "search": "qmc", "space": ("rank=4,8",)}, "--space 'rank=4,8' and --rank both"),
        ({"lr_schedule": "linear", "set": ("schedule=cosine",)}, "and --lr-schedule both set schedule"),
        (
            {"learning_rates": ("1e-3",), "search": "qmc", "space": ("learning-rate=log:1e-4:1e-2",)},
            "--space 'learning-rate=log:1e-4:1e-2' and --learning-rates both set learning_rate",
        ),
        ({"search": "optuna", "seeds": 3}, "--seeds 3: a search trains each point once; take --seeds 1"),
    ],
)
def test_each_mistake_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        StudyOptions(**options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_for_one_variant_alone_may_stand_beside_that_for_all() -> None:
    assert StudyOptions(rank=16, set=("lora.rank=4",)).set == ("lora.rank=4",)
