"""Sensitivity studies with known effects: losses of factors, stars of unfinished studies, and claim 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from configurations import template
from star_records import ALIAS, RATES, SURFACE, Surface, analyze_star, make_record, star_records, star_study

from orchestrator.analyze import sections
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.factors import count_claims
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Record
from orchestrator.study.factors import resweep_rates
from orchestrator.study.option import format_value
from orchestrator.study.space import apply_values

ARM_RATES = resweep_rates(RATES, 1e-2)


def factor(results: Results, title: str) -> Mapping[str, Any]:
    """Return the row of a factor in a study of one variant."""
    (row,) = results.factors[results.factors["title"] == title].to_dict("records")
    return row


def claim(results: Results) -> pd.Series:
    """Return the test of claim 1 in a study of one variant."""
    (row,) = (row for _, row in results.claims.iterrows())
    return row


def failed(record: Record) -> Record:
    return replace(record, state="failed", evaluations=())


def rank_of(record: Record) -> int:
    return record.configuration.variant.rank


def rate_of(record: Record) -> float:
    return record.configuration.optimizer.learning_rate


@pytest.fixture(scope="module")
def planted() -> Results:
    return analyze_star(star_records(SURFACE))


def test_the_planted_costs_lie_in_the_intervals(planted: Results) -> None:
    truth = {"batch size": 0.05, "schedule": 0.02, "rank": 0.0125, "dropout": 0.0}
    for title, cost in truth.items():
        row = factor(planted, title)
        for name in ("misset", "retuned"):
            assert row[f"{name}_low"] <= cost <= row[f"{name}_high"], title
        assert (row["misset_seeds"], row["alias"]) == (5, False)
    assert planted.factors["factor"][0] == "learning_rate", "the rate is first"
    assert planted.factors["misset"][1:].is_monotonic_decreasing


def test_an_alias_costs_much_blindly_and_nothing_with_the_rate_tuned_again(planted: Results) -> None:
    alpha = factor(planted, "alpha")
    assert alpha["misset"] > 0.15
    assert abs(alpha["retuned"]) < 0.02
    assert alpha["rate_retuned"] < factor(planted, "learning rate")["misset"] / 2


def replaced(surface: Surface, names: tuple[str, ...] = ("alpha", "rank"), **more: Any) -> Results:
    return analyze_star(star_records(surface, names=names, noise=0.001, **more))


@pytest.mark.parametrize(
    ("surface", "outcome", "claim_1"),
    [
        (ALIAS, "could", "supported"),
        (replace(ALIAS, costs={**ALIAS.costs, ("alpha", 1024.0): 0.05}), "could not", "undecided (range)"),
        (replace(ALIAS, costs={**ALIAS.costs, ("alpha", 1024.0): -0.05}), "could not", "undecided (range)"),
        (replace(SURFACE, aliases=()), "open", "supported"),
        (SURFACE, "open", "undecided (range)"),
    ],
    ids=["an alias", "a level is worse", "a level is better", "the best rate at an end", "a coarse grid"],
)
def test_the_rate_could_replace_alpha_if_no_level_changes_the_best_score(
    surface: Surface, outcome: str, claim_1: str
) -> None:
    found = replaced(surface)
    assert found.replacements["outcome"].unique().tolist() == [outcome]
    assert claim(found)["outcome"] == claim_1
    assert factor(found, "alpha")["alias"] == (outcome == "could")


def test_the_best_rate_of_an_alias_moves_by_the_inverse_of_its_level() -> None:
    for row in replaced(ALIAS).replacements.to_dict("records"):
        assert row["rate_ratio_low"] < 1 / row["times"] < row["rate_ratio_high"]
        assert row["difference_low"] < 0.005
        assert row["difference_high"] > -0.005


def test_the_ratio_of_lora_plus_is_tested_as_alpha_is() -> None:
    ratio = "lora_plus.ratio"
    records = star_records(
        replace(ALIAS, aliases=(ratio,)), template("lora_plus", ratio=16.0), (ratio, "rank"), noise=0.001
    )
    found = analyze_star(records).replacements
    assert found["factor"].unique().tolist() == [ratio]
    assert found["times"].tolist() == pytest.approx([0.25, 4.0])
    assert found["outcome"].unique().tolist() == ["could"]


def test_a_study_of_aliases_alone_does_not_support_the_claim() -> None:
    found = replaced(ALIAS, ("alpha",))
    assert found.replacements["outcome"].unique().tolist() == ["could"]
    assert found.verdicts["outcome"].tolist() == ["undecided", "supported"]


def test_the_losses_and_the_gain_of_the_rate_are_those_of_the_surface(planted: Results) -> None:
    """The loss D and the gain C (see `effects`) follow from the true score of the learning rate.

    At d decades from the optimum, which is 1e-2, the true score is 0.9 exp(-(d / 0.8)^2).
    """
    row = factor(planted, "learning rate")
    bell = [0.9 * math.exp(-((decades / 0.8) ** 2)) for decades in (0.0, 0.5, 0.25)]
    assert row["off_by_half_decade"] == pytest.approx(bell[0] - bell[1], abs=0.02)
    assert 0 < row["off_by_2"] < row["off_by_half_decade"]
    assert row["default"] == format_value(5.62e-3)
    assert row["gain"] == pytest.approx(bell[0] - bell[2], abs=0.02)
    assert row["edge_levels"] == ""


def test_collapsed_runs_count_as_their_score_and_beside_it_as_unusable(planted: Results) -> None:
    """Runs collapse at learning rates more than 0.8 decades above the best rate."""
    row = factor(planted, "learning rate")
    assert (row["usable"], row["ended"]) == (50, 55)


def test_a_claim_that_turns_with_the_range_of_the_rate_is_undecided() -> None:
    """The rate costs less than the rank over half of its range, and more over the measured range."""
    costs = {("rank", 2): 0.26, ("rank", 32): 0.26}
    found = analyze_star(
        star_records(Surface(width=1.2, cliff=9.0, aliases=(), costs=costs), names=("rank",))
    )
    assert claim(found)["outcome"] == "undecided (range)"
    assert claim(found)["outcome_half"] != claim(found)["outcome_double"]
    (verdict,) = found.verdicts.to_dict("records")
    assert verdict["outcome"] == "undecided"
    assert "the answer depends on how well the rate is known beforehand" in verdict["next_step"]
    assert verdict["next_command"] == ""


def test_the_claim_must_hold_for_four_of_five_variants() -> None:
    flat = Surface(width=6.0, cliff=9.0, aliases=(), costs={("rank", 2): 0.8, ("rank", 32): 0.8})
    names = ("rank", "dropout")
    good = [r for v in ("lora", "rslora", "pissa", "dora") for r in star_records(SURFACE, template(v), names)]
    found = analyze_star(good + star_records(flat, template("vera"), names))
    assert count_claims(found.claims) == {"judged": 5, "required": 4, "supported": 4, "refuted": 1}
    assert found.verdicts["outcome"].tolist() == ["supported"]
    two = [r for v in ("dora", "vera") for r in star_records(flat, template(v), names)]
    assert analyze_star(good[: -len(good) // 4] + two).verdicts["outcome"].tolist() == ["refuted"]


def test_controls_are_shown_and_not_counted() -> None:
    records = star_records(SURFACE, names=("rank",)) + star_records(SURFACE, template("full"), ("dropout",))
    claims = analyze_star(records).claims
    assert claims.set_index("variant")["counted"].to_dict() == {"full": False, "lora": True}
    assert count_claims(claims)["judged"] == 1


def test_every_part_of_an_unfinished_study_has_a_result() -> None:
    records = star_records(SURFACE, names=("rank", "batch_size"), seeds=2)
    draw = np.random.default_rng(0)
    for size in (1, 5, 20, 40, 60, len(records) - 1):
        kept = [records[i] for i in draw.permutation(len(records))[:size]]
        found = analyze(star_study(records), [failed(r) if draw.random() < 0.1 else r for r in kept])
        assert set(found.verdicts["outcome"]) <= {"undecided", "refuted"}
        assert found.warnings


def test_a_study_without_any_score_has_a_result() -> None:
    records = star_records(SURFACE, names=("rank",), seeds=1)
    found = analyze_star([failed(r) for r in records])
    assert len(found.claims) == len(found.factors) == 0
    assert found.verdicts["outcome"].tolist() in ([], ["undecided"])
    assert found.warnings == []


def test_the_default_of_a_single_factor_is_the_level_that_was_requested_first() -> None:
    """The curve and the levels have the same five rates, so only the order of requests tells them apart."""
    for name in ("lora", "rslora", "pissa", "dora"):
        records = star_records(SURFACE, template(name), names=("rank",), seeds=2, rates=ARM_RATES)
        assert factor(analyze_star(records), "rank")["default"] == "8"


def test_a_factor_whose_runs_failed_leaves_the_claim_open() -> None:
    records = star_records(SURFACE, names=("rank", "dropout"), seeds=3)
    found = analyze_star([failed(r) if rank_of(r) == 32 else r for r in records])
    assert found.verdicts["outcome"].tolist() == ["undecided"]


RANK = star_records(SURFACE, names=("rank",))


def test_missing_and_diverged_runs_leave_the_other_seeds() -> None:
    low_rank = [r for r in RANK if rank_of(r) == 2]
    lost, diverged = (next(r for r in low_rank if r.configuration.seed == seed) for seed in (3, 1))
    changed = [r for r in RANK if r not in (lost, diverged)] + [make_record(diverged.configuration, None)]
    row = factor(analyze_star(changed), "rank")
    assert row["misset_seeds"] == 4
    # Two levels at five rates and five seeds: one run is missing and one diverged, others collapse.
    assert row["ended"] == 49


@pytest.mark.parametrize(
    ("lacking", "is_arm", "seeds"),
    [(RATES, False, 0), (ARM_RATES, True, 5)],
    ids=["of the curve has no figures", "of an arm has the curve alone"],
)
def test_the_report_of_a_part(lacking: tuple[float, ...], is_arm: bool, seeds: int) -> None:
    """Each seed lacks the run at one rate, so no seed has a score at every rate."""
    ended = [r for r in RANK if (is_arm and rank_of(r) == 8) or lacking[r.configuration.seed] != rate_of(r)]
    found = analyze(star_study(RANK), ended)
    assert claim(found)["seeds"] == seeds
    assert math.isnan(factor(found, "learning rate")["misset"]) == (not is_arm)
    assert factor(found, "rank")["misset_seeds"] == 0
    assert found.verdicts["outcome"].tolist() == ["undecided"]


def test_a_rate_at_which_every_run_of_the_curve_failed_enters_no_figure() -> None:
    failing = ARM_RATES[-1]
    found = analyze_star([failed(r) if (rank_of(r), rate_of(r)) == (8, failing) else r for r in RANK])
    assert format_value(failing) not in factor(found, "learning rate")["levels"].split(", ")
    assert factor(found, "rank")["misset_seeds"] == 5
    # The arm has the other four rates.
    whole, rest = (
        factor(analyze_star(own), "rank") for own in (RANK, [r for r in RANK if rate_of(r) != failing])
    )
    assert factor(found, "rank")["retuned"] == pytest.approx(rest["retuned"])
    assert whole["rate_retuned"] != pytest.approx(rest["rate_retuned"])


def test_more_seeds_and_a_wider_curve_change_no_default() -> None:
    """Ten additional seeds of one level do not make this level the default."""
    more = [
        make_record(replace(r.configuration, seed=r.configuration.seed + 10), 0.5)
        for r in RANK
        if rank_of(r) == 2
    ]
    assert factor(analyze_star(RANK + more), "learning rate")["levels"] == ", ".join(map(format_value, RATES))


def test_the_table_resolves_a_width_by_the_rates_of_the_curve_alone() -> None:
    """The runs of an arm may have more rates than the curve, between its own."""
    records = star_records(SURFACE, names=("rank",), seeds=2)
    levels = {rank_of(r): r.configuration for r in records[1:] if rank_of(r) != rank_of(records[0])}
    more = [
        make_record(apply_values(level, {"learning_rate": 0.01 * 10 ** (k / 44)}), 0.8)
        for i, level in enumerate(levels.values())
        for k in range(1 + i, 11, 2)
    ]
    tables = [
        sections.make_sections(sections.Report(analyze_star(r)))[0].table for r in (records, records + more)
    ]
    cells = [table.rows[0][2] for table in tables if table]
    assert cells == ["not resolved", "not resolved"]
