"""The options of a search: their defaults."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.study.options import StudyOptions


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


def test_a_value_for_one_variant_alone_may_stand_beside_that_for_all() -> None:
    assert StudyOptions(rank=16, set=("lora.rank=4",)).set == ("lora.rank=4",)
