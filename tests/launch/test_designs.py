"""Designs: the configurations of each stage, what a larger study adds, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from configurations import template
from orchestrator.experiments.hyperparameter_sensitivity import SensitivityOptions
from orchestrator.experiments.lr_transfer import TransferOptions
from star_records import RATES, Surface, make_record

from orchestrator.analyze.factors import find_changed_factor
from orchestrator.experiments import load
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch.designs import (
    Design,
    DesignInput,
    ReplicatesDesign,
    StarDesign,
    WideningGrid,
    grid_offset,
    make_star,
    shifted_grid,
)
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import default_rate, load_factors, resweep_rates
from orchestrator.study.grids import parse_learning_rates
from orchestrator.util.errors import UsageError

Score = Callable[[Configuration], float | None]
TASKS = ("letters", "digits")
SEEDS = (0, 1)


def given(*variants: str, rates: tuple[float, ...], tasks: tuple[str, ...] = ("letters",)) -> DesignInput:
    """Return templates whose base model is not on this machine, as with --plan."""
    own = [template(variant, task) for task in tasks for variant in variants]
    templates = tuple(replace(t, model=replace(t.model, content=UNPREPARED)) for t in own)
    return DesignInput(templates, dict.fromkeys(tasks, rates))


def finished(configuration: Configuration, score: float | None) -> Record:
    """Return the record of a configuration; without a score it has diverged."""
    if score is None:
        return replace(make_record(configuration, 0.0), state="diverged", evaluations=())
    return make_record(configuration, score)


def train(configurations: Iterable[Configuration], score: Score) -> dict[str, Record]:
    return {c.fingerprint: finished(c, score(c)) for c in configurations}


def train_all(design: Design, score: Score, known: dict[str, Record] | None = None) -> dict[str, Record]:
    """Train the configurations that have no record, stage by stage, until the design requests no others."""
    records = dict(known or {})
    while new := [c for c in design.request(records.get) if c.fingerprint not in records]:
        records |= train(new, score)
    return records


def log_rate(configuration: Configuration) -> float:
    return math.log10(configuration.optimizer.learning_rate)


# The widening grid.

COARSE = (1e-3, 3.16e-3, 1e-2)


def grid(*variants: str, max_decades: float = 1.0, rates: tuple[float, ...] = COARSE) -> WideningGrid:
    return WideningGrid(given(*variants, rates=rates), SEEDS, max_decades)


def rates_of(records: dict[str, Record]) -> list[float]:
    """Return the rates, which are the same for every variant and every seed."""
    runs = [r.configuration for r in records.values()]
    rates = {c.optimizer.learning_rate for c in runs}
    assert len(runs) == len(rates) * len(SEEDS) * len({c.variant.name for c in runs})
    return sorted(rates)


def peak_at(*logs: float) -> Score:
    """Return a score that is best at one rate for each variant: lora, hira."""
    peaks = dict(zip(("lora", "hira"), logs, strict=False))
    return lambda c: 20.0 - abs(log_rate(c) - peaks[c.variant.name])


def test_a_grid_with_its_best_inside_does_not_widen() -> None:
    assert rates_of(train_all(grid("lora", "hira"), peak_at(-2.5, -2.5))) == list(COARSE)


def test_a_best_rate_on_the_edge_widens_the_grid_for_every_variant_until_it_is_bracketed() -> None:
    records = train_all(grid("lora", "hira"), peak_at(-2.5, -1.6))
    assert rates_of(records) == [*COARSE, 3.16e-2, 1e-1]
    assert train_all(grid("lora", "hira"), peak_at(0.0, 0.0), records) == records, "nothing is left to train"


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
    assert rates_of(train_all(grid("lora", rates=rates), log_rate)) == [*rates, *last]


def test_both_ends_widen_and_keep_within_the_bound() -> None:
    records = train_all(grid("lora", "hira"), peak_at(-9.0, 9.0))
    assert rates_of(records) == [1e-4, 3.16e-4, *COARSE, 3.16e-2, 1e-1]


@pytest.mark.parametrize(
    ("design", "score"),
    [
        (grid("lora", max_decades=0.0), peak_at(9.0)),
        (grid("lora", max_decades=0.4), peak_at(9.0)),
        (grid("lora", rates=(1e-3, 1e-2)), peak_at(9.0)),
        (grid("lora"), lambda c: 0.5),
        (grid("lora"), lambda c: None),
    ],
    ids=["no widening", "less room than the spacing", "no grid", "flat", "all diverged"],
)
def test_a_grid_stays_as_it_is(design: WideningGrid, score: Score) -> None:
    assert set(train_all(design, score)) == {c.fingerprint for c in design.outline()}


def test_nothing_is_added_before_every_run_of_the_task_has_ended() -> None:
    design = grid("lora")
    records = train(design.outline(), log_rate)
    assert len(design.request(records.get)) > len(records)
    records.popitem()
    assert design.request(records.get) == design.outline()


def test_tasks_widen_on_their_own() -> None:
    design = WideningGrid(given("lora", rates=COARSE, tasks=TASKS), (0,), 1.0)
    records = train(design.outline(), lambda c: log_rate(c) * (1 if c.task.name == "digits" else -1))
    new = [c for c in design.request(records.get) if c.fingerprint not in records]
    assert {(c.task.name, c.optimizer.learning_rate) for c in new} == {
        ("digits", 3.16e-2),
        ("letters", 3.16e-4),
    }


# Replicates.

WIDE = parse_learning_rates(["1e-4:1e-1:2"])


def replicated(replicates: int = 3, rates: tuple[float, ...] = WIDE) -> list[Configuration]:
    return ReplicatesDesign(given("lora", "hira", rates=rates, tasks=TASKS), replicates).request({}.get)


def test_every_replicate_has_its_seed_and_as_many_rates_that_all_variants_and_tasks_share() -> None:
    found = replicated()
    assert len({c.fingerprint for c in found}) == len(found) == 3 * 2 * 2 * len(WIDE)
    for replicate in range(3):
        grids = {
            tuple(c.optimizer.learning_rate for c in found if (c.task.name, c.variant.name, c.seed) == key)
            for key in ((task, v, replicate) for task in TASKS for v in ("lora", "hira"))
        }
        (shared,) = grids
        assert len(shared) == len(WIDE)


def test_further_replicates_and_rates_leave_the_earlier_runs_as_they_are() -> None:
    few, many = replicated(2), replicated(5)
    assert many[: len(few)] == few
    wider = {c.fingerprint for c in replicated(2, parse_learning_rates(["1e-5:1:2"]))}
    assert {c.fingerprint for c in few} <= wider


def test_offsets_are_spread_over_one_spacing_and_keep_the_spacing() -> None:
    offsets = [grid_offset(k) for k in range(400)]
    assert -0.5 <= min(offsets) < -0.45
    assert 0.45 < max(offsets) < 0.5
    assert abs(sum(offsets) / len(offsets)) < 0.05
    for k in range(20):
        shifted = shifted_grid(WIDE, k)
        assert all(abs(math.log10(b / a) - 0.5) < 0.01 for a, b in pairwise(shifted))
        assert math.log10(shifted[0] / WIDE[0]) == pytest.approx(0.5 * grid_offset(k), abs=0.01)
        assert all(float(f"{rate:.3g}") == rate for rate in shifted)


def test_an_uneven_list_of_rates_keeps_its_order() -> None:
    for k in range(20):
        shifted = shifted_grid((1e-4, 3e-4, 1e-2), k)
        assert list(shifted) == sorted(set(shifted))
        assert len(shifted) == 3


def test_one_rate_and_rates_that_are_too_close_are_refused() -> None:
    with pytest.raises(UsageError, match="letters has 1 rate"):
        replicated(2, (1e-3,))
    with pytest.raises(UsageError, match="closer than a shift"):
        replicated(5, (1e-3, 1.001e-3, 1.002e-3))


# The star.


def star(
    tmp_path: Path,
    *variants: str,
    factors: tuple[str, ...] = ("alpha", "rank"),
    num_levels: int = 2,
    num_seeds: int = 2,
) -> StarDesign:
    return make_star(given(*variants, rates=RATES), range(num_seeds), factors, num_levels, tmp_path)


def surface(configuration: Configuration) -> float:
    return Surface().score(configuration, given(configuration.variant.name, rates=RATES).templates[0])


def test_the_curve_comes_first_and_the_arms_lie_around_its_best_rate(tmp_path: Path) -> None:
    design = star(tmp_path, "lora")
    curve = design.request({}.get)
    assert len(curve) == len(RATES) * 2
    both = design.request(train(curve, surface).get)
    arms = both[len(curve) :]
    assert both[: len(curve)] == curve
    ranks = [c for c in arms if c.variant.rank != 8]
    assert {c.optimizer.learning_rate for c in ranks} == {*resweep_rates(RATES, 1e-2), default_rate(RATES)}
    assert len(ranks) == 2 * 6 * 2  # levels, rates, seeds
    levels = {(c.variant.alpha, c.variant.rank) for c in arms}
    assert levels == {(4.0, 8), (1024.0, 8), (16.0, 2), (16.0, 32)}
    assert len(design.outline()) == len(train_all(design, surface))


@pytest.mark.parametrize("alias", ["an alias", "no alias", "the other way", "nothing learned"])
def test_the_best_rate_of_every_alpha_is_between_its_neighbors(tmp_path: Path, alias: str) -> None:
    """Alpha x 64 has its best rate 1.8 decades below the default's, which is 1e-2, or at another place."""
    moved = {"an alias": -1.806, "no alias": 0.0, "the other way": 0.6, "nothing learned": math.nan}[alias]

    def score(c: Configuration) -> float:
        if c.variant.alpha != 1024.0:
            return surface(replace(c, variant=replace(c.variant, alpha=16.0)))
        distance = math.log10(c.optimizer.learning_rate) + 2 - moved
        return 0.0 if math.isnan(distance) or distance > 0.8 else 0.9 * math.exp(-((distance / 0.8) ** 2))

    done = train_all(star(tmp_path, "lora", factors=("alpha",)), score)
    own = [r for r in done.values() if r.configuration.variant.alpha == 1024.0]
    found = {r.configuration.optimizer.learning_rate: score(r.configuration) for r in own}
    rates, best = sorted(found), max(found, key=lambda rate: found[rate])
    if alias == "nothing learned":
        assert len(rates) == 8
        return
    place = rates.index(best)
    gaps = [math.log10(b / a) for a, b in pairwise(rates[place - 1 : place + 2])]
    assert gaps == pytest.approx([0.25, 0.25], abs=0.01)
    assert abs(math.log10(best) + 2 - moved) < 0.13
    assert len(rates) <= 13


def test_every_template_goes_on_as_soon_as_its_own_curve_has_ended(tmp_path: Path) -> None:
    design = star(tmp_path, "lora", "rslora")
    ended = train((c for c in design.request({}.get) if c.variant.name == "lora"), surface)
    arms = [c for c in design.request(ended.get) if c.variant.rank != 8 or c.variant.alpha != 16.0]
    assert {c.variant.name for c in arms} == {"lora"}


@pytest.mark.parametrize(
    "more", [{"factors": ("alpha", "rank", "dropout")}, {"num_levels": 3}, {"num_seeds": 3}]
)
def test_a_larger_star_trains_only_what_is_new(tmp_path: Path, more: dict[str, Any]) -> None:
    done = train_all(star(tmp_path, "lora"), surface)
    larger = star(tmp_path, "lora", **more)
    asked = {c.fingerprint for c in larger.request(train_all(larger, surface, done).get)}
    assert asked > done.keys()


def test_a_curve_without_a_score_has_no_arms(tmp_path: Path) -> None:
    design = star(tmp_path, "lora")
    failed = {f: replace(r, state="failed") for f, r in train(design.request({}.get), lambda c: None).items()}
    assert design.request(failed.get) == design.request({}.get)


def test_a_factor_that_a_variant_lacks_is_said_and_left_out(tmp_path: Path) -> None:
    design = star(tmp_path, "lora", "hira")
    assert "hira has no alpha: left out." in design.notes
    assert {c.variant.alpha for c in design.outline() if c.variant.name == "hira"} == {None}
    with pytest.raises(UsageError, match="no variant of the study has one of them"):
        star(tmp_path, "hira", factors=("alpha",))


def test_a_level_that_the_variant_refuses_is_said_and_left_out(tmp_path: Path) -> None:
    """AdaLoRA's warm-up and final phase must not fill all steps."""
    extra = {"initial": 1.5, "warmup": 0.1, "final": 0.6, "orthogonality": 0.5}
    own = given("adalora", rates=RATES)
    only = replace(own.templates[0], variant=replace(own.templates[0].variant, extra=extra))
    design = make_star(replace(own, templates=(only,)), SEEDS, ("adalora.final",), 2, tmp_path)
    assert any(note.startswith("adalora, adalora.final 1.2: left out") for note in design.notes)
    assert [c.variant.extra["final"] for c in design.levels[0]] == [0.3]


EIGHT = ["alpha", "rank", "batch_size", "dropout", "warmup", "weight_decay", "schedule", "steps"]


@pytest.mark.parametrize(
    ("options", "factors", "levels", "seeds"),
    [
        (SensitivityOptions(), EIGHT, 2, 5),
        (SensitivityOptions(dry_run=True), ["alpha", "batch_size"], 2, 2),
        (SensitivityOptions(factors=("rank", "dropout"), levels=1, seeds=3), ["rank", "dropout"], 1, 3),
    ],
    ids=["defaults", "dry run", "typed"],
)
def test_a_study_of_factors_refines_the_task_s_own_grid_and_has_its_factors(
    options: SensitivityOptions, factors: list[str], levels: int, seeds: int
) -> None:
    own = given("lora", rates=(1e-3, 1e-2, 1.0))
    design = load("sensitivity").make_design(options, own)
    curve = design.request({}.get)
    rates = [c.optimizer.learning_rate for c in curve if c.seed == 0]
    assert rates[:5] == [1e-3, 1.78e-3, 3.16e-3, 5.62e-3, 1e-2]
    assert (len(rates), rates[-1]) == (13, 1.0)
    assert len(curve) == seeds * len(rates)
    known = load_factors()
    changed = [find_changed_factor(c, own.templates[0], [*known.values()]) for c in design.levels[0]]
    assert changed == [known[name] for name in factors for _ in range(levels)]


def test_a_study_of_factors_leaves_typed_rates_as_they_are() -> None:
    options = SensitivityOptions(learning_rates=("1e-3:1e-1:2",), seeds=1)
    rates = parse_learning_rates(options.learning_rates)
    curve = load("sensitivity").make_design(options, given("lora", rates=rates)).request({}.get)
    assert tuple(c.optimizer.learning_rate for c in curve) == rates


# The transfer of the rate.

FINE = parse_learning_rates(("1e-3:1e-1:4",))


def transfer(*variants: str, **options: Any) -> Design:
    chosen = TransferOptions(
        variants=variants, dry_run=True, seeds=2, learning_rates=("1e-3:1e-1:4",), **options
    )
    return load("transfer").make_design(chosen, given(*variants, rates=FINE))


def test_links_move_a_setting_with_the_factor_and_share_the_level_of_the_template() -> None:
    runs = transfer("lora", levels=("2", "8"), link=("none", "alpha")).request({}.get)
    assert {(c.variant.rank, c.variant.alpha) for c in runs} == {(2, 16.0), (8, 16.0), (2, 4.0)}
    assert len(runs) == 3 * len(FINE) * 2 == len({c.fingerprint for c in runs})
    runs = transfer("hira", factor="batch_size", levels=("8", "32"), link=("examples",)).request({}.get)
    start = template("hira")
    size = start.lr_schedule.steps * start.batches.batch_size
    assert {c.lr_schedule.steps * c.batches.batch_size for c in runs} == {size}


def test_a_level_with_its_best_rate_at_an_end_widens_its_own_grid() -> None:
    def score(configuration: Configuration) -> float:
        return 0.9 - 0.1 * abs(log_rate(configuration) + (0.5 if configuration.variant.rank == 4 else 2.0))

    design = transfer("lora", levels=("2", "4"), link=("none",), by="score")
    records = train_all(design, score)
    highest = {
        rank: max(
            c.optimizer.learning_rate
            for c in (r.configuration for r in records.values())
            if c.variant.rank == rank
        )
        for rank in (2, 4)
    }
    assert highest[2] == 0.1
    assert highest[4] > 10**-0.5


def test_levels_that_are_impossible_are_left_out_and_named() -> None:
    design = transfer("lora", "full", levels=("2", "4"), link=("none",))
    assert design.notes == ("full has no rank: left out.",)
    assert {c.variant.name for c in design.request({}.get)} == {"lora"}
    with pytest.raises(UsageError, match="fewer than two levels"):
        transfer("full", levels=("2", "4"), link=("none",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": "steps"}, "name its levels"),
        ({"levels": ("8",)}, "one level"),
        ({"levels": ("8", "x")}, "'x' is not a number"),
        ({"factor": "steps", "levels": ("8", "16"), "link": ("alpha",)}, "none or examples"),
        ({"factor": "model", "levels": ("a", "b"), "model": "c"}, "name the models with --levels"),
    ],
)
def test_wrong_levels_and_links_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TransferOptions(**options)
