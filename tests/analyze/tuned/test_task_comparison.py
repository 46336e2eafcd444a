"""Intervals, outcomes, shares, looks and claim 2 of replicated tunings with known truth."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats
from synthetic import record
from tuned_records import Truth, compare, compare_one, shifted_rates, study_of, tuned_records

from orchestrator.analyze import report
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Summary
from orchestrator.analyze.run_labels import label_runs
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.tuned.task_comparison import compare_tuned
from orchestrator.analyze.tuned.tuned_results import TaskComparison, VariantRow
from orchestrator.analyze.tuned.tuned_verdicts import tuned_warnings
from orchestrator.cli.commands import Report
from orchestrator.record.schema import ItemResults, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

EQUAL = {v: Truth(optimum=x) for v, x in (("lora", -2.0), ("pissa", -2.6), ("hira", -1.0), ("dora", -2.1))}


def row_of(task: TaskComparison, variant: str) -> VariantRow:
    return next(row for row in task.rows if row.variant == variant)


def test_variants_with_other_best_rates_and_the_same_top_are_not_called_different() -> None:
    """The rates of one coarse grid miss the optima by different amounts; shifted grids average them."""
    wrong = 0
    for seed in range(12):
        task = compare_one(tuned_records(EQUAL, noise=0.003, seed=seed))
        wrong += any(row.outcome in ("better", "worse") for row in task.rows[1:])
    assert wrong <= 2, "5 % of 12 studies are 0.6"


def test_half_of_the_variants_is_not_most() -> None:
    one_of_two = {"lora": Truth(), "pissa": Truth(0.96), "hira": Truth(0.84)}
    found = compare_one(tuned_records(one_of_two))
    assert (found.outcome, found.counted, found.holds_at_least, found.beaten_at_least) == ("refuted", 2, 1, 1)


def test_controls_and_unverified_variants_are_shown_and_enter_no_count_and_no_span() -> None:
    truths = {**EQUAL, "full": Truth(0.99, -3.0), "head_only": Truth(0.2), "new": Truth(0.97)}
    task = compare_one(tuned_records(truths), unverified=("new",))
    roles = {row.variant: (row.role, row.counts) for row in task.rows}
    assert roles["full"] == roles["head_only"] == ("control", "not counted")
    assert roles["new"] == ("unverified", "not counted")
    assert row_of(task, "full").interval is not None
    assert task.counted == 3
    assert task.span is not None
    assert task.span < 0.03
    assert task.fixed_rate is not None
    assert {row.variant for row in task.fixed_rate.rows} == {"pissa", "hira", "dora"}


def test_unusable_tunings_leave_an_interval_of_the_others_and_a_share_with_an_exact_test() -> None:
    records = tuned_records(EQUAL, replicates=8)
    broken = [
        replace(r, state="diverged")
        if r.configuration.variant.name == "hira" and r.configuration.seed < 6
        else r
        for r in records
    ]
    task = compare_one(broken)
    hira = row_of(task, "hira")
    assert hira.usable is not None
    assert (hira.usable.usable, hira.usable.n, hira.pairs) == (2, 8, 2)
    assert hira.interval is not None
    # McNemar: 0 of 6 discordant replicates, 2 / 2^6, times three variants.
    assert hira.usable_p == pytest.approx(3 * 2 / 2**6)
    assert task.outcome != "descriptive"


@pytest.mark.parametrize("lowest", [-4.0, -2.0])
def test_a_tuning_in_which_every_run_ends_at_the_untrained_score_is_not_usable(lowest: float) -> None:
    """Whether the tie falls to a rate below or above the best one of the other replicates."""
    whole = tuned_records({"lora": Truth(), "pissa": Truth(0.91, -2.6)}, replicates=10)
    records = [record("pissa", rate, 3, 0.3, untrained=0.3) for rate in shifted_rates(3, lowest)]
    others = [r for r in whole if r.configuration.variant.name == "lora" or r.configuration.seed != 3]
    records += [replace(r, baseline_scores=records[0].baseline_scores) for r in others]
    row = row_of(compare_one(records), "pissa")
    assert row.usable is not None
    assert row.interval is not None
    assert (row.usable.usable, row.usable.n, row.pairs) == (9, 10, 9)
    assert row.interval.high - row.interval.low < 0.03, "the failure is in the share, not in the difference"


def test_a_variant_that_is_usable_less_often_is_no_better_for_that() -> None:
    """Claim 2 is refuted by the scores of the usable replicates alone, as if the others did not exist."""
    truths = {"lora": Truth(), "pissa": Truth(0.96, -2.6)}
    records = tuned_records(truths, replicates=14, noise=0.015)
    broken = [
        replace(r, state="diverged")
        if r.configuration.variant.name == "pissa" and r.configuration.seed >= 4
        else r
        for r in records
    ]
    task = compare_one(broken)
    row = row_of(task, "pissa")
    assert row.usable_p == pytest.approx(2 / 2**10)
    assert (row.pairs, row.counts) == (4, "no")
    assert task.p_against is not None
    assert task.p_against > row.usable_p
    both_usable = compare_one([r for r in records if r.configuration.seed < 4])
    assert task.p_against == pytest.approx(both_usable.p_against)


def test_a_variant_that_never_gives_a_usable_run_is_worse_by_its_share_alone() -> None:
    def lost(variant: str) -> list[Record]:
        records = tuned_records(EQUAL, replicates=8)
        return [
            replace(r, state="diverged") if r.configuration.variant.name == variant else r for r in records
        ]

    hira = row_of(compare_one(lost("hira")), "hira")
    assert (hira.interval, hira.outcome, hira.counts) == (None, "worse", "yes")
    assert hira.reason == "no replicates are usable for both"
    task = compare_one(lost("lora"))
    assert {row.counts for row in task.rows[1:]} == {"no"}
    assert task.outcome == "refuted", "an unusable baseline does not match the others"


def test_a_replicate_in_which_every_run_failed_is_missing_from_the_share_of_usable_tunings() -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth()}, replicates=4)
    lost = [
        replace(r, state="failed")
        if r.configuration.variant.name == "pissa" and r.configuration.seed == 0
        else r
        for r in records
    ]
    task = compare_one(lost)
    usable = row_of(task, "pissa").usable
    assert usable is not None
    assert (usable.usable, usable.n, row_of(task, "pissa").pairs) == (3, 3, 3)
    assert not any(
        "neither diverged nor collapsed" in each for each in summarize(study_of(lost), lost).warnings
    )


def with_questions(records: list[Record], questions: int, flips: dict[str, float]) -> list[Record]:
    """Return records with a result per question. `flips`: variant -> share of the results that it changes."""
    generator = np.random.default_rng(0)
    base = (generator.random(questions) < 0.8).astype(float)
    results = {}
    for variant, share in flips.items():
        flipped = generator.permutation(questions)[: round(share * questions)]
        results[variant] = base.copy()
        results[variant][flipped] = 1 - results[variant][flipped]
    found = []
    for r in records:
        own = results[r.configuration.variant.name].copy()
        one = r.configuration.seed % questions
        own[one] = 1 - own[one]  # so that replicates differ
        items = {"test": ItemResults(tuple(own))}
        new = record(
            r.configuration.variant.name,
            r.configuration.optimizer.learning_rate,
            r.configuration.seed,
            r.score("validation"),
            float(own.mean()),
        )
        found.append(replace(new, items=items))
    return found


def test_the_noise_of_the_questions_widens_the_intervals() -> None:
    records = with_questions(
        tuned_records({"lora": Truth(), "pissa": Truth()}), 100, {"lora": 0.0, "pissa": 0.2}
    )
    task = compare_one(records)
    row = row_of(task, "pissa")
    assert task.has_question_noise
    chosen = {t.chosen.fingerprint for each in task.rows for t in each.tunings if t.chosen is not None}
    results: dict[str, list[tuple[float, ...]]] = {"lora": [], "pissa": []}
    for each in records:
        if each.fingerprint in chosen:
            results[each.configuration.variant.name].append(each.items["test"].correct)
    own, base = (np.mean(results[name], axis=0) for name in ("pissa", "lora"))
    assert row.question_error == pytest.approx(stats.sem(own - base))
    without = compare_one([replace(r, items={}) for r in records])
    assert not without.has_question_noise
    narrow, wide = row_of(without, "pissa").interval, row.interval
    assert narrow is not None
    assert wide is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_score_that_is_no_mean_of_its_questions_has_no_question_noise() -> None:
    records = with_questions(
        tuned_records({"lora": Truth(), "pissa": Truth()}), 100, {"lora": 0.0, "pissa": 0.2}
    )
    other = [replace(r, items={"test": ItemResults((1.0,) * 99 + (0.5,))}) for r in records]
    assert row_of(compare_one(other), "pissa").question_error is None


def test_a_replicate_far_from_the_others_is_a_warning() -> None:
    """One tuning of pissa ends 15 points lower. Replicates of plain noise give no warning."""
    truths = {"lora": Truth(), "pissa": Truth(), "dora": Truth()}
    plain = tuned_records(truths, replicates=10, noise=0.005)
    low = tuned_records({"pissa": Truth(0.75)}, replicates=5, noise=0.005)[-9:]
    kept = [r for r in plain if (r.configuration.variant.name, r.configuration.seed) != ("pissa", 4)]
    warned = [[w for w in tuned_warnings(compare(own)) if "far from" in w] for own in (plain, kept + low)]
    assert warned[0] == []
    (warning,) = warned[1]
    assert "pissa (replicate 4: -1" in warning
    assert "dora" not in warning


def test_earlier_looks_cost_width_and_a_look_beyond_the_plan_has_no_error_left() -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth(0.92)})
    only, second, half = (
        compare_one(records, looks, max_replicates=planned)
        for looks, planned in (((), 6), ((3, 6), 6), ((), 12))
    )
    assert only.alpha == pytest.approx(0.05, abs=1e-4)
    assert second.looks == (3, 6), "the same number again is no new look"
    assert half.alpha < second.alpha < only.alpha
    late = compare_one(records, (), max_replicates=4)
    assert late.alpha == 0
    assert row_of(late, "pissa").outcome == "undecided"
    assert late.outcome == "undecided"


@pytest.mark.parametrize("scores", [(0.5, 0.5, 0.9, 0.1), (0.9, 0.9, 0.905, 0.9), (0.9, 0.9, 0.9, 0.1)])
def test_two_replicates_have_intervals_however_wide(scores: tuple[float, ...]) -> None:
    tried = [("lora", 0), ("lora", 1), ("pissa", 0), ("pissa", 1)]
    records = [record(v, 1e-2, s, x, x) for (v, s), x in zip(tried, scores, strict=True)]
    row = row_of(compare_one(records, (), max_replicates=3), "pissa")
    assert row.interval is not None
    assert -1 <= row.interval.low <= row.interval.high <= 1
    assert (row.outcome, row.counts, row.pairs) == ("undecided", "open", 2)
    assert row.resolvable is None or row.resolvable > 0


def test_while_runs_are_missing_only_whole_tunings_count() -> None:
    records = tuned_records(EQUAL, replicates=4)
    study = study_of(records)
    kept = [r for r in records if not (r.configuration.seed == 3 and r.configuration.variant.name == "dora")][
        :-1
    ]
    found = compare_tuned(study, kept, label_runs(kept))
    assert found is not None
    (task,) = found.tasks
    assert task.missing
    assert (row_of(task, "dora").pairs, task.replicates) == (3, 4)
    assert found.look == 0, "no planned look"
    assert compare(records).look == 4
    assert compare_tuned(study, [], {}) is None


def test_the_report_command_counts_as_a_look(tmp_path: Path) -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth()}, replicates=3)
    study = study_of(records, max_replicates=6)
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    study.write(tmp_path / study.name)
    assert Report(output=tmp_path, study=study.name).run() == 0
    found = StudyFile.read(tmp_path / study.name)
    assert found is not None
    assert found.looks == (3,)


def test_a_record_that_is_written_while_the_report_command_reads_is_in_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, *records = tuned_records({"lora": Truth(), "pissa": Truth()}, replicates=3)
    study = study_of([late, *records])
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    study.write(tmp_path / study.name)
    get = Store.get

    def get_and_put(opened: Store, fingerprint: str) -> Record | None:
        found = get(opened, fingerprint)
        store.put(late)
        return found

    with monkeypatch.context() as during_the_first:
        during_the_first.setattr(Store, "get", get_and_put)
        assert Report(output=tmp_path, study=study.name).run() == 0
    assert Report(output=tmp_path, study=study.name).run() == 0
    assert json.loads((tmp_path / study.name / "summary.json").read_text())["pending"] == 0


@pytest.mark.parametrize("is_running", [True, False])
def test_the_report_command_writes_no_older_list_over_that_of_a_study_that_grows_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth()}, replicates=3)
    study = study_of(records, max_replicates=6)
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    study.write(tmp_path / study.name)
    grown = study.with_configurations(["a" * 64], ())

    def write_while_the_study_grows(*arguments: Any) -> Summary:
        summary = write_report(*arguments)
        grown.write(tmp_path / study.name)
        return summary

    monkeypatch.setattr(report, "write_report", write_while_the_study_grows)
    with FileLock(tmp_path / study.name / ".lock") if is_running else nullcontext():
        assert Report(output=tmp_path, study=study.name).run() == 0
    expected = grown if is_running else grown.with_look(3)
    assert StudyFile.read(tmp_path / study.name) == expected


def test_the_claim_over_several_tasks_corrects_for_their_number() -> None:
    lower = {v: Truth(0.84, t.optimum) if v != "lora" else t for v, t in EQUAL.items()}
    records = [
        r for i, task in enumerate(("digits", "letters")) for r in tuned_records(lower, task=task, seed=i)
    ]
    found = compare(records)
    assert [task.task for task in found.tasks] == ["digits", "letters"]
    assert (found.tasks_supported_at_least, found.tasks_refuted_at_least) == (2, 0)
    over, *_ = summarize(study_of(records), records).verdicts
    assert (over.scope, over.outcome) == ("2 tasks", "supported")


def test_without_a_counted_variant_the_claim_is_descriptive() -> None:
    found = compare_one(tuned_records({"lora": Truth(), "full": Truth(0.95)}, replicates=3))
    assert (found.outcome, found.counted, found.holds_at_least, found.p_claim) == ("descriptive", 0, 0, None)
