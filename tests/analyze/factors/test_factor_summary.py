"""Summary and verdict of a study of factors, from synthetic records with known effects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from star_records import FACTORS, RATES, Surface, make_record, star_records, template

from orchestrator.analyze.factors.factor_results import FactorStudy, VariantFactors
from orchestrator.analyze.factors.factor_verdicts import factor_verdicts, factor_warnings
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.factors import resweep_rates
from orchestrator.study.space import apply_values

COMMAND = "python experiments/hyperparameter_sensitivity.py --task letters --factors alpha rank --seeds 5"
SURFACE = Surface(
    costs={
        ("batch_size", 64): 0.15,
        ("batch_size", 4): 0.05,
        ("rank", 2): 0.05,
        ("schedule", "constant"): 0.06,
    }
)
PLANTED = ["learning rate", "batch size", "schedule", "rank", "dropout"]
"""The factors outside the alias group in the order of their planted costs: 5, 2, 1.25 and 0 points."""


def summary_of(records: list[Record]) -> Summary:
    """Return the summary of a study of factors."""
    return summarize(study_of(records), records)


def study_of(records: list[Record]) -> StudyFile:
    """Return a study of factors that has requested these records in this order."""
    names = tuple(dict.fromkeys(r.fingerprint for r in records))
    return StudyFile("s", "?", COMMAND, names, settings=AnalysisSettings(kind="factors"))


def factors_of(records: list[Record]) -> FactorStudy:
    """Return the factors of a study."""
    found = summary_of(records).factor_study
    assert found is not None
    return found


def verdict_of(records: list[Record]) -> Verdict:
    """Return the only verdict of a study."""
    (verdict,) = summary_of(records).verdicts
    return verdict


def only_variant(records: list[Record]) -> VariantFactors:
    """Return the factors of a study's only variant."""
    return factors_of(records).tasks[0].variants[0]


@pytest.fixture(scope="module")
def planted() -> VariantFactors:
    return only_variant(star_records(SURFACE))


def test_a_planted_order_of_factors_is_recovered_blindly_and_tuned_again(planted: VariantFactors) -> None:
    outside = [planted.rate, *(f for f in planted.factors if not f.alias)]
    by_a = sorted(outside, key=lambda f: -(f.misset.mean or 0))
    by_b = sorted(outside, key=lambda f: -(f.retuned.mean or 0))
    assert [f.title for f in by_a] == PLANTED
    assert [f.title for f in by_b] == PLANTED


def test_the_planted_costs_lie_in_the_intervals(planted: VariantFactors) -> None:
    truth = {"batch size": 0.05, "schedule": 0.02, "rank": 0.0125, "dropout": 0.0}
    for factor in planted.factors:
        if factor.title in truth:
            for estimate in (factor.misset, factor.retuned):
                assert estimate.interval is not None
                assert estimate.interval.low <= truth[factor.title] <= estimate.interval.high, factor.title


def test_an_alias_costs_much_blindly_and_nothing_with_the_rate_tuned_again(planted: VariantFactors) -> None:
    alpha = next(f for f in planted.factors if f.alias)
    assert alpha.title == "alpha"
    assert (alpha.misset.mean or 0) > 0.15
    assert abs(alpha.retuned.mean or 1) < 0.02
    assert alpha.rate_retuned is not None
    assert (alpha.rate_retuned.mean or 1) < 0.1


def test_collapsed_runs_count_as_their_score_and_beside_it_as_unusable(planted: VariantFactors) -> None:
    """In the surface, runs collapse at rates more than 0.8 decades above the best rate."""
    assert planted.rate.labels["collapsed"] == 5
    assert planted.rate.usable is not None
    assert planted.rate.usable.share == pytest.approx(50 / 55)


def test_the_claim_is_supported_in_words_that_have_the_deciding_numbers() -> None:
    verdict = verdict_of(star_records(SURFACE))
    assert verdict.outcome == "supported"
    assert "closest case is batch size for lora" in verdict.answer
    assert "Alpha acts as a learning rate" in verdict.answer
    assert "letters on letters-base; variants lora" in verdict.design
    assert (verdict.next_step, verdict.next_command) == ("", "")


def test_the_claim_is_refuted_where_another_factor_costs_more() -> None:
    steep = Surface(width=6.0, cliff=9.0, aliases=(), costs={("rank", 2): 0.8, ("rank", 32): 0.8})
    records = star_records(steep, names=("rank",))
    assert verdict_of(records).outcome == "refuted"
    assert "The claim fails for lora" in verdict_of(records).answer


def test_a_claim_that_turns_with_the_range_of_the_rate_is_undecided() -> None:
    """The rate costs less than the rank over half of its range, and more over the measured range."""
    records = star_records(
        Surface(width=1.2, cliff=9.0, aliases=(), costs={("rank", 2): 0.26, ("rank", 32): 0.26}),
        names=("rank",),
    )
    variant = only_variant(records)
    assert variant.claim.outcome == "undecided (range)"
    assert variant.claim.outcomes["half"] != variant.claim.outcomes["double"]
    verdict = verdict_of(records)
    assert verdict.outcome == "undecided"
    assert "how well the rate is known beforehand" in verdict.next_step


def test_few_seeds_with_much_noise_ask_for_more_seeds_with_a_command_that_keeps_the_script() -> None:
    surface = Surface(costs={("batch_size", 64): 0.5, ("batch_size", 4): 0.5}, aliases=())
    verdict = verdict_of(star_records(surface, names=("batch_size",), seeds=2, noise=0.05))
    assert verdict.outcome == "undecided"
    assert verdict.next_command.startswith(
        "python experiments/hyperparameter_sensitivity.py --task letters --factors alpha rank --seeds "
    )
    assert int(verdict.next_command.split()[-1]) > 2


def test_the_claim_must_hold_for_four_of_five_variants() -> None:
    flat = Surface(width=6.0, cliff=9.0, aliases=(), costs={("rank", 2): 0.8, ("rank", 32): 0.8})
    names = ("rank", "dropout")
    good = [r for v in ("lora", "rslora", "pissa", "dora") for r in star_records(SURFACE, template(v), names)]
    task = factors_of(good + star_records(flat, template("vera"), names)).tasks[0]
    assert (task.num_judged, task.num_required, task.num_supported) == (5, 4, 4)
    two_bad = good[: -len(good) // 4] + [
        r for v in ("dora", "vera") for r in star_records(flat, template(v), names)
    ]
    assert verdict_of(two_bad).outcome == "refuted"


def test_controls_are_shown_and_not_counted() -> None:
    records = star_records(SURFACE, names=("rank",)) + star_records(SURFACE, template("full"), ("dropout",))
    task = factors_of(records).tasks[0]
    assert task.uncounted == ("full",)
    assert task.num_judged == 1


def test_only_the_curve_at_the_default_is_shown_as_a_curve() -> None:
    (panel,) = summary_of(star_records(SURFACE)).panels
    (curve,) = panel.curves
    assert [p.learning_rate for p in curve.points] == list(RATES)


def test_a_curve_without_arms_says_that_nothing_else_was_measured() -> None:
    records = [r for r in star_records(SURFACE) if r.configuration.variant.rank == 8]
    curve = [r for r in records if r.configuration == replace_rate_and_seed(r)]
    verdict = verdict_of(curve)
    assert verdict.outcome == "undecided"
    assert "no factor but the learning rate" in verdict.answer


def replace_rate_and_seed(record: Record) -> object:
    """Return the default configuration at the rate and with the seed of a record."""
    c = record.configuration
    return replace(apply_values(template(), {"learning_rate": c.optimizer.learning_rate}), seed=c.seed)


def failed(record: Record) -> Record:
    """Return the record of a run that failed."""
    return replace(record, state="failed", evaluations=())


def at(record: Record, rank: int, rate: float | None = None) -> bool:
    """Return whether a record has this rank and, if given, this learning rate."""
    c = record.configuration
    return c.variant.rank == rank and rate in (None, c.optimizer.learning_rate)


def test_every_part_of_an_unfinished_study_has_a_summary() -> None:
    records = star_records(SURFACE, names=("rank", "batch_size"), seeds=2)
    draw = np.random.default_rng(0)
    for size in (1, 5, 20, 40, 60, len(records) - 1):
        kept = [records[i] for i in draw.permutation(len(records))[:size]]
        summary_of([failed(r) if draw.random() < 0.1 else r for r in kept])


def test_the_default_of_a_single_factor_is_the_level_that_was_requested_first() -> None:
    """Curve and levels have the same five rates, so that nothing else tells them apart."""
    rates = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
    for name in ("lora", "rslora", "pissa", "dora"):
        records = star_records(SURFACE, template(name), names=("rank",), seeds=2, rates=rates)
        assert only_variant(records).factors[0].default == "8"


def test_an_unfinished_study_supports_nothing_and_names_its_command() -> None:
    records = star_records(SURFACE)
    study = study_of(records)
    summary = summarize(study, [r for r in records if not at(r, 32)])
    (verdict,) = summary.verdicts
    assert verdict.outcome == "undecided"
    assert verdict.next_command == COMMAND
    assert any("have not ended" in warning for warning in summary.warnings)


def test_a_factor_whose_runs_failed_is_named_and_leaves_the_claim_open() -> None:
    records = star_records(SURFACE, names=("rank", "dropout"), seeds=3)
    verdict = verdict_of([failed(r) if at(r, 32) else r for r in records])
    assert verdict.outcome == "undecided"
    assert verdict.next_step.startswith("There is no interval for rank (lora)")


def test_missing_and_diverged_runs_leave_the_other_seeds() -> None:
    records = star_records(SURFACE, names=("rank",))
    low_rank = [r for r in records if r.configuration.variant.rank == 2]
    lost = next(r for r in low_rank if r.configuration.seed == 3)
    diverged = next(r for r in low_rank if r.configuration.seed == 1)
    changed = [r for r in records if r not in (lost, diverged)] + [make_record(diverged.configuration, None)]
    variant = only_variant(changed)
    assert variant.factors[0].misset.n == 4
    assert variant.factors[0].labels["diverged"] == 1


def test_the_report_of_an_interrupted_curve_has_no_figures() -> None:
    """Each seed lacks one rate of the curve, so that no seed is complete."""
    records = star_records(SURFACE, names=("rank",))
    lacking = RATES[:5]
    ended = [r for r in records if lacking[r.configuration.seed] != r.configuration.optimizer.learning_rate]
    variant = only_variant(ended)
    assert variant.seeds == 0
    assert variant.rate.misset.mean is None
    assert variant.importance == {"half": {}, "measured": {}, "double": {}}


def test_the_report_of_an_interrupted_arm_has_the_curve_alone() -> None:
    """Each seed lacks one rate of the arm, so that no seed is complete."""
    records = star_records(SURFACE, names=("rank",))
    lacking = resweep_rates(RATES, 1e-2)
    ended = [
        r
        for r in records
        if r.configuration.variant.rank == 8
        or lacking[r.configuration.seed] != r.configuration.optimizer.learning_rate
    ]
    variant = only_variant(ended)
    assert variant.factors[0].misset.n == 0
    assert variant.importance["measured"] == {"learning rate": 1.0}
    assert verdict_of(ended).outcome == "undecided"


def test_a_rate_at_which_every_run_of_the_curve_failed_enters_no_figure() -> None:
    failing = resweep_rates(RATES, 1e-2)[-1]
    records = [
        replace(r, state="failed", evaluations=())
        if r.configuration.optimizer.learning_rate == failing and r.configuration.variant.rank == 8
        else r
        for r in star_records(SURFACE, names=("rank",))
    ]
    variant = only_variant(records)
    assert failing not in variant.rate.rates
    assert variant.factors[0].rates == resweep_rates(RATES, 1e-2)[:-1]
    assert variant.factors[0].misset.n == 5


def test_runs_of_two_changes_and_a_missing_factor_are_said() -> None:
    twice = apply_values(template(), {"rank": 2, "dropout": 0.1, "learning_rate": 1e-2})
    records = star_records(SURFACE) + star_records(SURFACE, template("hira")) + [make_record(twice, 0.5)]
    warnings = factor_warnings(factors_of(records))
    assert any("1 runs differ from the default in more than one factor" in w for w in warnings)
    assert any("hira" in w and "without alpha" in w for w in warnings)


def test_more_seeds_and_a_wider_curve_change_no_default() -> None:
    """Ten more seeds of one level do not make that level the default."""
    records = star_records(SURFACE, names=("rank",))
    more = [
        make_record(replace(r.configuration, seed=r.configuration.seed + 10), 0.5)
        for r in records
        if r.configuration.variant.rank == 2
    ]
    assert only_variant(records + more).rate.rates == RATES


def test_importance_depends_on_the_range(planted: VariantFactors) -> None:
    shares = {name: own["learning rate"] for name, own in planted.importance.items()}
    assert shares["half"] < shares["measured"]
    assert {*planted.importance["measured"]} == {"learning rate", "alpha", "rank", *PLANTED[1:]}


def test_a_default_outside_of_every_figure_gives_one_verdict_per_task() -> None:
    records = star_records(SURFACE, names=FACTORS[:2])
    records += star_records(SURFACE, template(task="digits"), names=FACTORS[:2])
    assert [v.design.split()[0] for v in factor_verdicts(factors_of(records), COMMAND)] == [
        "digits",
        "letters",
    ]
