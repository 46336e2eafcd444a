"""The grid that widens while a best rate lies on its edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from synthetic import record

from orchestrator.launch.design import DesignInput
from orchestrator.launch.widening_grid import WideningGrid
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

RATES = (1e-3, 3.16e-3, 1e-2)
SEEDS = (0, 1)


def make_grid(*variants: str, max_decades: float = 1.0, rates: tuple[float, ...] = RATES) -> WideningGrid:
    templates = tuple(record(variant, rate=1.0).configuration for variant in variants)
    return WideningGrid(DesignInput(StudyOptions(), templates, {"letters": rates}), SEEDS, max_decades)


def train_all(grid: WideningGrid, score: Callable[[str, float], float | None]) -> dict[str, Record]:
    """Train the requested configurations, stage by stage, until the grid requests no further ones."""
    records: dict[str, Record] = {}
    while new := [c for c in grid.request(records) if c.fingerprint not in records]:
        for c in new:
            made = record(
                c.variant.name,
                c.optimizer.learning_rate,
                c.seed,
                score(c.variant.name, c.optimizer.learning_rate),
            )
            assert made.fingerprint == c.fingerprint
            records[c.fingerprint] = made
    return records


def rates_of(records: dict[str, Record], variant: str) -> list[float]:
    own = {r.configuration.optimizer.learning_rate for r in records.values()} if records else set()
    for r in records.values():
        assert r.configuration.seed in SEEDS
    kept = {
        r.configuration.optimizer.learning_rate
        for r in records.values()
        if r.configuration.variant.name == variant
    }
    assert kept == own, "all variants have the same rates"
    return sorted(kept)


def peak_at(log_rate: float) -> Callable[[str, float], float]:
    return lambda variant, rate: max(0.0, 1.0 - abs(math.log10(rate) - log_rate))


def test_a_grid_with_its_best_inside_does_not_widen() -> None:
    records = train_all(make_grid("lora", "hira"), peak_at(-2.5))
    assert rates_of(records, "lora") == list(RATES)
    assert len(records) == 2 * len(RATES) * len(SEEDS)


def test_a_best_rate_on_the_edge_widens_the_grid_for_every_variant_until_it_is_bracketed() -> None:
    peaks = {"lora": -2.5, "hira": -1.6}
    records = train_all(make_grid("lora", "hira"), lambda v, rate: peak_at(peaks[v])(v, rate))
    assert rates_of(records, "hira") == [*RATES, 3.16e-2, 1e-1]
    assert rates_of(records, "lora") == [*RATES, 3.16e-2, 1e-1]


@pytest.mark.parametrize(
    ("rates", "last"),
    [
        ((1e-3, 3e-3, 1e-2), [3e-2, 1e-1]),
        ((1e-6, 1e-5, 2e-5, 5e-5), [1e-4, 2e-4, 5e-4]),
        ((1e-4, 4e-4, 1.6e-3), [4e-3, 1.6e-2]),
        ((1e-3, 1.5e-3, 2.25e-3), [3.37e-3, 5.06e-3, 7.6e-3, 1.14e-2, 1.5e-2, 2.25e-2]),
    ],
)
def test_a_grid_continues_its_own_pattern(rates: tuple[float, ...], last: list[float]) -> None:
    records = train_all(make_grid("lora", rates=rates), lambda variant, rate: rate)
    assert rates_of(records, "lora") == [*rates, *last]


def test_both_ends_widen_and_keep_within_the_bound() -> None:
    peaks = {"lora": -9.0, "hira": 9.0}
    records = train_all(make_grid("lora", "hira"), lambda v, rate: -abs(math.log10(rate) - peaks[v]))
    assert rates_of(records, "lora") == [1e-4, 3.16e-4, *RATES, 3.16e-2, 1e-1]


@pytest.mark.parametrize(
    ("grid", "score"),
    [
        (make_grid("lora", max_decades=0.0), peak_at(9.0)),
        (make_grid("lora", max_decades=0.4), peak_at(9.0)),
        (make_grid("lora", rates=(1e-3, 1e-2)), peak_at(9.0)),
        (make_grid("lora"), lambda variant, rate: 0.5),
        (make_grid("lora"), lambda variant, rate: None),
    ],
    ids=["no widening", "less room than the spacing", "no grid", "flat", "all diverged"],
)
def test_a_grid_stays_as_it_is(grid: WideningGrid, score: Callable[[str, float], float | None]) -> None:
    assert set(train_all(grid, score)) == {c.fingerprint for c in grid.outline()}


def test_nothing_is_added_before_every_run_of_the_task_has_ended() -> None:
    grid = make_grid("lora")
    records = {
        c.fingerprint: record("lora", c.optimizer.learning_rate, c.seed, c.optimizer.learning_rate)
        for c in grid.outline()
    }
    assert len(grid.request(records)) > len(records)
    records.popitem()
    assert grid.request(records) == grid.outline()


def test_it_says_which_best_rate_is_at_which_end() -> None:
    peaks = {"lora": -9.0, "hira": 9.0, "dora": -2.5}
    grid = make_grid(*peaks)
    records = {
        c.fingerprint: record(
            c.variant.name,
            c.optimizer.learning_rate,
            c.seed,
            -abs(math.log10(c.optimizer.learning_rate) - peaks[c.variant.name]),
        )
        for c in grid.outline()
    }
    added = [c for c in grid.request(records) if c.fingerprint not in records]
    assert grid.explain(added, records) == (
        "the best rate of lora is the lowest of the grid (0.001) and the best rate of hira is the highest of "
        "the grid (0.01)"
    )


def test_tasks_widen_on_their_own() -> None:
    letters: Configuration = record("lora", rate=1.0).configuration
    digits = replace(letters, task=replace(letters.task, name="digits"))
    grid = WideningGrid(
        DesignInput(StudyOptions(), (letters, digits), {"letters": RATES, "digits": RATES}), (0,), 1.0
    )
    records = {}
    for c in grid.outline():
        rate = c.optimizer.learning_rate
        score = rate if c.task.name == "digits" else -rate
        records[c.fingerprint] = record("lora", rate, 0, score, task=c.task.name)
    new = [c for c in grid.request(records) if c.fingerprint not in records]
    assert {(c.task.name, c.optimizer.learning_rate) for c in new} == {
        ("digits", 3.16e-2),
        ("letters", 3.16e-4),
    }
