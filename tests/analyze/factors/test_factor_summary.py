"""Summary and verdict of a study of factors, from synthetic records with known effects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from configurations import template
from star_records import RATES, Surface, make_record, star_records

from orchestrator.analyze.factors.factor_results import FactorStudy, VariantFactors
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.factors import resweep_rates

COMMAND = "python experiments/hyperparameter_sensitivity.py --task letters --factors alpha rank --seeds 5"
SURFACE = Surface(
    costs={
        ("batch_size", 64): 0.15,
        ("batch_size", 4): 0.05,
        ("rank", 2): 0.05,
        ("schedule", "constant"): 0.06,
    }
)


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


def test_a_claim_that_turns_with_the_range_of_the_rate_is_undecided() -> None:
    """The rate costs less than the rank over half of its range, and more over the measured range."""
    records = star_records(
        Surface(width=1.2, cliff=9.0, aliases=(), costs={("rank", 2): 0.26, ("rank", 32): 0.26}),
        names=("rank",),
    )
    variant = only_variant(records)
    assert variant.claim.outcome == "undecided (range)"
    assert variant.claim.outcomes["half"] != variant.claim.outcomes["double"]
    assert verdict_of(records).outcome == "undecided"


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


def test_a_factor_whose_runs_failed_leaves_the_claim_open() -> None:
    records = star_records(SURFACE, names=("rank", "dropout"), seeds=3)
    assert verdict_of([failed(r) if at(r, 32) else r for r in records]).outcome == "undecided"


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


def test_more_seeds_and_a_wider_curve_change_no_default() -> None:
    """Ten more seeds of one level do not make that level the default."""
    records = star_records(SURFACE, names=("rank",))
    more = [
        make_record(replace(r.configuration, seed=r.configuration.seed + 10), 0.5)
        for r in records
        if r.configuration.variant.rank == 2
    ]
    assert only_variant(records + more).rate.rates == RATES
