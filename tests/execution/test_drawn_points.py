"""Designs are evenly spread, equal for all variants, and the beginning of larger designs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from points import configuration
from scipy.stats import qmc
from search_drive import own, space

from orchestrator.execution.search import (
    Params,
    SearchGroup,
    design_points,
    distributions,
    draw_sequence,
    make_sampler,
    open_search,
    random_points,
)
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Space, get_value, parse_space

NOWHERE = Path("/there-is-no-such-folder")


def drawn(sampler: str, over: Space, points: int) -> dict[str, list[Configuration]]:
    """Return variant -> the configurations of a design."""
    templates = [configuration(variant) for variant in over]
    made = open_search(NOWHERE, sampler, points, {"letters": over}, templates).configurations.values()
    return {variant: [c for c in made if c.variant.name == variant] for variant in over}


def values(points: list[Configuration], *keys: str) -> list[tuple[object, ...]]:
    return [tuple(get_value(point, key) for key in keys) for point in points]


def test_qmc_fills_every_stratum_of_the_learning_rate_and_is_more_even_than_random() -> None:
    over = space("weight_decay=0:0.1", variants=("lora",))
    spread: dict[str, float] = {}
    for name in ("qmc", "random"):
        optimizers = [point.optimizer for point in drawn(name, over, 32)["lora"]]
        unit = [(math.log10(o.learning_rate) / 4 + 1, o.weight_decay * 10) for o in optimizers]
        spread[name] = qmc.discrepancy(unit)
        strata = [sorted(min(31, int(32 * x[axis])) for x in unit) for axis in (0, 1)]
        if name == "qmc":
            # A Sobol sequence has one of its first 32 points in each of 32 strata of each axis; rounding to
            # three digits may move a point into the next stratum.
            assert all(len(set(each)) >= 31 for each in strata)
    assert spread["qmc"] < spread["random"] / 4


def test_choices_come_up_equally_often() -> None:
    found = values(
        drawn("qmc", space("rank=4,8,16,32", "schedule=linear,cosine"), 32)["lora"], "rank", "schedule"
    )
    assert {n: sum(rank == n for rank, _ in found) for n in (4, 8, 16, 32)} == dict.fromkeys(
        (4, 8, 16, 32), 8
    )
    assert sum(schedule == "linear" for _, schedule in found) == 16


def test_a_space_with_few_points_gives_them_all() -> None:
    over = parse_space(["rank=4,8,16"], own("lora", "full"), (1e-2,), ("learning_rate",))
    found = drawn("qmc", over, 16)
    assert sorted(p.variant.rank for p in found["lora"]) == [4, 8, 16]
    assert len(found["full"]) == 1


@pytest.mark.parametrize("name", ["qmc", "random"])
def test_many_choices_are_all_found(name: str) -> None:
    """Random draws alone would hardly find the last points: each comes up once in 240 draws on average."""
    words = ["rank=int:1:60", "schedule=linear,cosine", "batch_size=8,16"]
    over = parse_space(words, own("lora", "hira"), (1e-2,), ("learning_rate",))
    found = drawn(name, over, 240)
    keys = ("rank", "schedule", "batch_size")
    assert len(set(values(found["lora"], *keys))) == 240
    assert values(found["lora"], *keys) == values(found["hira"], *keys)
    assert drawn(name, over, 200)["lora"] == found["lora"][:200]


def test_others_are_each_point_of_a_small_space_once() -> None:
    (over,) = parse_space(
        ["rank=int:3:6", "lora.rank=int:2:4", "schedule=linear,cosine"],
        own("lora"),
        (1e-4, 1e-2),
        ("learning_rate",),
    ).values()
    found = list(random_points(over, "0"))
    assert sorted((p["lora.rank"], p["schedule"]) for p in found) == [
        (r, s) for r in (2, 3, 4) for s in ("cosine", "linear")
    ]
    assert found != list(random_points(over, "1"))


def test_what_the_variant_refuses_is_passed_over() -> None:
    class Even(SearchGroup):
        def build(self, params: Params) -> Configuration | None:
            return super().build(params) if params["rank"] % 2 == 0 else None

    (over,) = space("rank=int:1:64", variants=("lora",)).values()
    even = Even("lora", configuration("lora"), over, 16)
    points: Iterator[tuple[Params, Configuration]] = design_points(even, draw_sequence("random", over, 0))
    assert all(point.variant.rank % 2 == 0 for _, point in islice(points, 16))


def test_a_sampler_does_not_repeat_its_draws_after_a_restart() -> None:
    from optuna import create_study

    made_of = distributions(space(variants=("lora",))["lora"])
    seeds = ("0/0", "0/0", "0/1", "0/2", "1/0")
    firsts = [create_study(sampler=make_sampler("tpe", seed, 16)).ask(made_of).params for seed in seeds]
    assert firsts[0] == firsts[1]
    assert len({str(each) for each in firsts}) == 4
