"""Designs are evenly spread, equal for all variants, and the beginning of larger designs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from points import configuration
from scipy.stats import qmc
from search_drive import own, space

from orchestrator.execution.search.groups import SearchGroup, make_groups
from orchestrator.execution.search.samplers import (
    distributions,
    draw_points,
    from_optuna_params,
    make_sampler,
    random_points,
    to_optuna_params,
)
from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.space import Space, parse_space

WORDS = ("rank=4,8,16,32", "alpha=log:4:64", "lora_plus.ratio=log:1:64", "schedule=linear,cosine")


def groups(over: Space, replicate: int = 0) -> list[SearchGroup]:
    templates = [configuration(variant) for variant in over]
    return list(make_groups({"letters": over}, templates, (replicate,), "letters").values())


def test_qmc_fills_every_stratum_of_the_learning_rate_and_is_more_even_than_random() -> None:
    over = space("weight_decay=0:0.1", variants=("lora",))
    spread: dict[str, float] = {}
    for name in ("qmc", "random"):
        points = draw_points(name, groups(over), 32)["lora"]
        unit = [
            (math.log10(float(p["learning_rate"])) / 4 + 1, float(p["weight_decay"]) * 10) for p in points
        ]
        spread[name] = qmc.discrepancy(unit)
        strata = [sorted(min(31, int(32 * x[axis])) for x in unit) for axis in (0, 1)]
        if name == "qmc":
            # A Sobol sequence has one of its first 32 points in each of 32 strata of each axis; rounding to
            # three digits may move a point into the next stratum.
            assert all(len(set(each)) >= 31 for each in strata)
    assert spread["qmc"] < spread["random"] / 4


def test_choices_come_up_equally_often() -> None:
    found = draw_points("qmc", groups(space("rank=4,8,16,32", "schedule=linear,cosine")), 32)["lora"]
    assert {n: sum(p["rank"] == n for p in found) for n in (4, 8, 16, 32)} == dict.fromkeys((4, 8, 16, 32), 8)
    assert sum(p["schedule"] == "linear" for p in found) == 16


def test_a_space_with_few_points_gives_them_all() -> None:
    over = parse_space(["rank=4,8,16"], own("lora", "full"), (1e-2,), ("learning_rate",))
    found = draw_points("qmc", groups(over), 16)
    assert sorted(p["rank"] for p in found["lora"]) == [4, 8, 16]
    assert found["full"] == [{}]


@pytest.mark.parametrize("name", ["qmc", "random"])
def test_many_choices_are_all_found(name: str) -> None:
    """Random draws alone would hardly find the last points: each comes up once in 240 draws on average."""
    words = ["rank=int:1:60", "schedule=linear,cosine", "batch_size=8,16"]
    over = parse_space(words, own("lora", "hira"), (1e-2,), ("learning_rate",))
    found = draw_points(name, groups(over), 240)
    for points in found.values():
        assert len({tuple(point.values()) for point in points}) == 240
    assert found["lora"] == found["hira"]
    assert draw_points(name, groups(over), 200)["lora"] == found["lora"][:200]


def test_others_are_each_point_of_a_small_space_once() -> None:
    (over,) = parse_space(
        ["rank=int:3:6", "lora.rank=int:2:4", "schedule=linear,cosine"],
        own("lora"),
        (1e-4, 1e-2),
        ("learning_rate",),
    ).values()
    found = list(random_points(over, 0))
    assert sorted((p["lora.rank"], p["schedule"]) for p in found) == [
        (r, s) for r in (2, 3, 4) for s in ("cosine", "linear")
    ]
    assert found != list(random_points(over, 1))


def test_others_of_a_large_space_are_its_own() -> None:
    (over,) = space(*WORDS, variants=("lora_plus",)).values()
    found = list(random_points(over, 0))
    assert all(from_optuna_params(over, to_optuna_params(over, point)) == point for point in found)
    assert len({tuple(point.values()) for point in found}) > 990


def test_what_the_variant_refuses_is_passed_over() -> None:
    class Even(SearchGroup):
        def build(self, values: Mapping[str, Value]) -> Configuration | None:
            return super().build(values) if int(values["rank"]) % 2 == 0 else None

    (group,) = groups(space("rank=int:1:64", variants=("lora",)))
    even = Even(group.name, group.template, group.dimensions)
    found = draw_points("random", [even], 16)["lora"]
    assert len(found) == 16
    assert all(int(p["rank"]) % 2 == 0 for p in found)


def test_values_and_draws_are_each_others_inverse() -> None:
    from optuna import create_study

    over = space(*WORDS, "lora_plus.rank=logint:2:64", variants=("lora_plus",))["lora_plus"]
    study = create_study(sampler=make_sampler("random", 8, 0))
    for _ in range(20):
        found = from_optuna_params(over, study.ask(fixed_distributions=distributions(over)).params)
        assert from_optuna_params(over, to_optuna_params(over, found)) == found


def test_a_sampler_does_not_repeat_its_draws_after_a_restart() -> None:
    from optuna import create_study

    over = space(variants=("lora",))["lora"]
    firsts = [
        create_study(sampler=make_sampler("tpe", 16, asked))
        .ask(fixed_distributions=distributions(over))
        .params
        for asked in (0, 0, 1, 2, 3)
    ]
    assert firsts[0] == firsts[1]
    assert len({str(each) for each in firsts}) == 4
