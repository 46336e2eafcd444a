"""Replicated tuning: tunings, differences, shares, claims 2 and 3, on studies of known truth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import analyze_curves, record, study
from tuned_records import Truth, compare, is_of, row_of, shifted_rates, study_of, task_of, tuned_records

from orchestrator.analyze import sections
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.comparison import compare_at_fixed_rate
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Results
from orchestrator.cli.commands import Report
from orchestrator.record.schema import Evaluation, ItemResults, Record
from orchestrator.record.store import Store

EQUAL = {v: Truth(optimum=x) for v, x in (("lora", -2.0), ("pissa", -2.6), ("hira", -1.0), ("dora", -2.1))}
TWO = {"lora": Truth(), "pissa": Truth()}


def diverge(records: list[Record], variant: str, *replicates: int) -> list[Record]:
    """Return the records, with every run of the given tunings diverged."""
    return [replace(r, state="diverged") if is_of(r, variant, *replicates) else r for r in records]


def has_interval(row: Mapping[str, Any]) -> bool:
    return not math.isnan(row["difference_low"])


# -- tunings


def test_validation_alone_chooses_and_ties_go_to_the_lowest_rate() -> None:
    scores = ((1e-3, 0.7, 0.1), (1e-2, 0.8, 0.5), (3e-2, 0.8, 0.9))
    found = compare([record(rate=rate, validation=own, test=test) for rate, own, test in scores])
    (best,) = found.best.to_dict("records")
    assert (best["learning_rate"], best["test_score"]) == (1e-2, 0.5)
    assert best["edges"] == "learning_rate (high edge)", "the highest rate is as good"
    assert row_of(found, "lora")["test_score"] == 0.5


def test_a_diverged_run_counts_as_the_floor_and_a_stopped_or_failed_one_is_not_chosen() -> None:
    found = compare([
        record(rate=1e-3, validation=0.2),
        record(rate=1e-2, validation=None, floor=0.0),
        record(rate=3e-2, validation=0.9, state="stopped"),
        record(rate=1e-1, validation=None, state="failed"),
    ])  # fmt: skip
    assert found.best["learning_rate"].tolist() == [1e-3]
    runs = found.runs.sort_values("learning_rate")
    assert runs["label"].tolist() == ["finished", "diverged", "stopped", "failed"]
    assert runs["validation_score"].fillna(-1).tolist() == [0.2, 0.0, -1, -1]
    nothing = compare([record(rate=1e-2, validation=None)])
    assert nothing.best["learning_rate"].tolist() == [1e-2]
    assert row_of(nothing, "lora")["usable"] == 0, "the only run is chosen, and is not usable"


def test_incomplete_tunings_are_left_out() -> None:
    records = [record(rate=rate, seed=s, validation=0.5) for s in range(3) for rate in (1e-3, 1e-2)][:-1]
    found = compare(records)
    assert row_of(found, "lora")["replicates"] == task_of(found)["replicates"] == 2
    assert task_of(found)["missing"]


@pytest.mark.parametrize(("missing", "variants"), [(False, ["lora", "pissa"]), (True, ["lora"])])
def test_while_runs_are_missing_a_variant_with_fewer_runs_than_the_others_has_no_whole_tuning(
    missing: bool, variants: list[str]
) -> None:
    tried = [("lora", 1e-3), ("lora", 1e-2), ("pissa", 1e-3)]
    records = [record(v, rate=rate, seed=s, validation=0.5) for v, rate in tried for s in range(2)]
    file = study_of(records)
    if missing:
        file = replace(file, configurations=("missing", *file.configurations))
    found = analyze(file, records).comparison
    assert found["variant"].tolist() == variants
    assert found["replicates"].tolist() == [2] * len(variants)


def test_the_pooled_curve_finds_the_optimum_between_the_rates_of_any_one_grid() -> None:
    records = tuned_records({"lora": Truth(optimum=-1.87)}, replicates=12, noise=0.001)
    found = compare(records, margin=0.02)
    row = row_of(found, "lora")
    assert found.pooled["runs"].sum() == 12 * len(shifted_rates(0))
    assert abs(row["best_rate"] / 10**-1.87 - 1) < 0.15
    assert not row["best_rate_at_edge"]
    assert row["best_rate"] not in found.pooled["learning_rate"].tolist(), "interpolated"
    assert 0.4 < row["width"] < 0.9, "within 0.02 of the top: 0.32 decades below it and up to 0.32 above"
    sharp = row_of(compare(records, margin=0.0001), "lora")
    assert math.isnan(sharp["width"]), "narrower than the bins: not resolved"


def with_general(found: Record, rise: float) -> Record:
    """Return a record of a language model whose loss on the split "general" rises from 2 nats by `rise`."""
    before, after = ({"loss": loss, "bits_per_byte": loss / 4} for loss in (2.0, 2.0 + rise))
    return replace(
        found,
        evaluations=(*found.evaluations, Evaluation(found.steps, "general", after)),
        baseline_scores={**found.baseline_scores, "general": before},
    )


@pytest.mark.parametrize("analyzed", [compare, analyze_curves])
def test_forgetting_is_a_column_with_a_dash_for_older_records_and_none_without_any(analyzed: Any) -> None:
    rises = {"lora": 0.5, "pissa": 0.2}
    old = [record(v, seed=k, validation=0.8) for v in (*rises, "dora") for k in range(3)]
    new = [
        with_general(each, rises[each.configuration.variant.name] + each.configuration.seed / 10)
        if each.configuration.variant.name in rises
        else each
        for each in old
    ]
    before, first = (next(iter(sections.glance(sections.Report(analyzed(each))))) for each in (old, new))
    assert before.table is not None
    assert first.table is not None
    assert "Forgetting" not in before.text
    assert "forgetting" not in [column.header for column in before.table.columns]
    assert "changes by +0.30 (pissa) to +0.60 (lora) nats per token" in first.text
    headers = [column.header for column in first.table.columns]
    cells = {row[0]: row[headers.index("forgetting")] for row in first.table.rows if row[0] != "untrained"}
    assert cells == {"lora": "0.600 [0.352, 0.848]", "pissa": "0.300 [0.052, 0.548]", "dora": "-"}
    if analyzed is compare:
        place = headers.index("forgetting minus that of LoRA")
        assert {row[0]: row[place] for row in first.table.rows} == {
            "lora": "-",
            "pissa": "-0.300",
            "dora": "-",
        }


# -- the comparison with the baseline, and claim 2


def test_variants_with_other_best_rates_and_the_same_top_are_not_called_different() -> None:
    """A coarse grid misses the variants' best rates by different amounts. Shifted grids average this out."""
    wrong = 0
    for seed in range(12):
        found = compare(tuned_records(EQUAL, noise=0.003, seed=seed)).comparison
        wrong += found["outcome"].isin(["better", "worse"]).any()
    assert wrong <= 2, "5 % of 12 studies are 0.6"


def test_half_of_the_variants_is_not_most() -> None:
    found = compare(tuned_records({"lora": Truth(), "pissa": Truth(0.96), "hira": Truth(0.84)}))
    task = task_of(found)
    assert (task["counted"], task["holds_at_least"], task["beaten_at_least"]) == (2, 1, 1)
    assert found.verdicts["outcome"][0] == "refuted"
    assert found.comparison["variant"].tolist() == ["lora", "pissa", "hira"], "sorted by the difference"


def test_controls_and_unverified_variants_are_shown_and_enter_no_count_and_no_span() -> None:
    truths = {**EQUAL, "full": Truth(0.99, -3.0), "head_only": Truth(0.2), "new": Truth(0.97)}
    found = compare(tuned_records(truths), unverified=("new",))
    roles = {name: (row_of(found, name)["role"], row_of(found, name)["counts"]) for name in truths}
    assert roles["full"] == roles["head_only"] == ("control", "not counted")
    assert roles["new"] == ("unverified", "not counted")
    assert has_interval(row_of(found, "full"))
    assert task_of(found)["counted"] == 3
    assert task_of(found)["span"] < 0.03
    assert set(found.fixed_rate["variant"]) == {"pissa", "hira", "dora"}
    answer = found.verdicts["answer"][0]
    assert not any(name in answer for name in ("full", "head_only", "new")), "they are no variants"


def test_unusable_tunings_leave_an_interval_of_the_others_and_a_share_with_an_exact_test() -> None:
    found = compare(diverge(tuned_records(EQUAL, replicates=8), "hira", *range(6)))
    hira = row_of(found, "hira")
    assert (hira["usable"], hira["tunings"], hira["pairs"]) == (2, 8, 2)
    assert has_interval(hira)
    # McNemar: 0 of 6 discordant replicates, 2 / 2^6, times three variants.
    assert hira["usable_p"] == pytest.approx(3 * 2 / 2**6)
    assert found.verdicts["outcome"][0] != "descriptive"


@pytest.mark.parametrize("lowest", [-4.0, -2.0])
def test_a_tuning_in_which_every_run_ends_at_the_untrained_score_is_not_usable(lowest: float) -> None:
    """The chosen rate lies below or above the best rates of the other replicates."""
    whole = tuned_records({"lora": Truth(), "pissa": Truth(0.91, -2.6)}, replicates=10)
    records = [record("pissa", rate, 3, 0.3, untrained=0.3) for rate in shifted_rates(3, lowest)]
    others = [r for r in whole if not is_of(r, "pissa", 3)]
    records += [replace(r, baseline_scores=records[0].baseline_scores) for r in others]
    row = row_of(compare(records), "pissa")
    assert (row["usable"], row["tunings"], row["pairs"]) == (9, 10, 9)
    width = row["difference_high"] - row["difference_low"]
    assert width < 0.03, "the failure is in the share, not in the difference"


def test_a_variant_that_is_usable_less_often_is_no_better_for_that() -> None:
    """The p value against claim 2 is that of the replicates in which both variants are usable."""
    truths = {"lora": Truth(), "pissa": Truth(0.96, -2.6)}
    records = tuned_records(truths, replicates=14, noise=0.015)
    found = compare(diverge(records, "pissa", *range(4, 14)))
    row, task = row_of(found, "pissa"), task_of(found)
    assert row["usable_p"] == pytest.approx(2 / 2**10)
    assert (row["pairs"], row["counts"]) == (4, "no")
    assert task["p_against"] > row["usable_p"]
    both_usable = task_of(compare([r for r in records if r.configuration.seed < 4]))
    assert task["p_against"] == pytest.approx(both_usable["p_against"])


def test_a_variant_that_never_gives_a_usable_run_is_worse_by_its_share_alone() -> None:
    records = tuned_records(EQUAL, replicates=8)
    found = compare(diverge(records, "hira"))
    hira = row_of(found, "hira")
    assert (has_interval(hira), hira["outcome"], hira["counts"]) == (False, "worse", "yes")
    assert "hira (no replicates are usable for both)" in found.verdicts["answer"][0]
    lost = compare(diverge(records, "lora"))
    assert set(lost.comparison["counts"][1:]) == {"no"}
    assert lost.verdicts["outcome"][0] == "refuted", "an unusable baseline does not match the others"


def test_a_replicate_in_which_every_run_failed_is_missing_from_the_share_of_usable_tunings() -> None:
    records = tuned_records(TWO, replicates=4)
    found = compare([replace(r, state="failed") if is_of(r, "pissa", 0) else r for r in records])
    row = row_of(found, "pissa")
    assert (row["usable"], row["tunings"], row["pairs"]) == (3, 3, 3)
    assert not any("neither diverged nor collapsed" in each for each in found.warnings)


def with_questions(records: list[Record], questions: int, flips: dict[str, float]) -> list[Record]:
    """Return the records, with a result of 0 or 1 for each question of the test split.

    Args:
        records: The records.
        questions: The number of questions.
        flips: Variant -> share of the questions at which its results differ from the common results.
    """
    generator = np.random.default_rng(0)
    base = (generator.random(questions) < 0.8).astype(float)
    results = {}
    for variant, share in flips.items():
        flipped = generator.permutation(questions)[: round(share * questions)]
        results[variant] = base.copy()
        results[variant][flipped] = 1 - results[variant][flipped]
    found = []
    for r in records:
        variant, seed = r.configuration.variant.name, r.configuration.seed
        own = results[variant].copy()
        own[seed % questions] = 1 - own[seed % questions]  # so that replicates differ
        rate = r.configuration.optimizer.learning_rate
        new = record(variant, rate, seed, r.score("validation"), float(own.mean()))
        found.append(replace(new, items={"test": ItemResults(tuple(own))}))
    return found


def test_the_noise_of_the_questions_widens_the_intervals() -> None:
    records = with_questions(tuned_records(TWO), 100, {"lora": 0.0, "pissa": 0.2})
    found = compare(records)
    row = row_of(found, "pissa")
    assert task_of(found)["has_item_error"]
    chosen = set(found.best["fingerprint"])
    results: dict[str, list[tuple[float, ...]]] = {"lora": [], "pissa": []}
    for each in records:
        if each.fingerprint in chosen:
            results[each.configuration.variant.name].append(each.items["test"].correct)
    own, base = (np.mean(results[name], axis=0) for name in ("pissa", "lora"))
    assert row["item_error"] == pytest.approx(stats.sem(own - base))
    without = compare([replace(r, items={}) for r in records])
    assert not task_of(without)["has_item_error"]
    assert "on these 200 test items" in without.verdicts["answer"][0]
    assert "test items" not in found.verdicts["answer"][0]
    narrow, wide = (
        each["difference_high"] - each["difference_low"] for each in (row_of(without, "pissa"), row)
    )
    assert wide > 2 * narrow
    no_mean = [replace(r, items={"test": ItemResults((1.0,) * 99 + (0.5,))}) for r in records]
    assert math.isnan(row_of(compare(no_mean), "pissa")["item_error"]), (
        "the score is no mean of these results"
    )


def test_a_replicate_far_from_the_others_is_a_warning() -> None:
    """One tuning of pissa ends 15 points lower. Replicates that differ by noise alone give no warning."""
    plain = tuned_records({**TWO, "dora": Truth()}, replicates=10, noise=0.005)
    low = tuned_records({"pissa": Truth(0.75)}, replicates=5, noise=0.005)[-9:]
    kept = [r for r in plain if not is_of(r, "pissa", 4)]
    warned = [[w for w in compare(own).warnings if "far from" in w] for own in (plain, kept + low)]
    assert warned[0] == []
    (warning,) = warned[1]
    assert "pissa (replicate 4: -1" in warning
    assert "dora" not in warning


@pytest.mark.parametrize("scores", [(0.5, 0.5, 0.9, 0.1), (0.9, 0.9, 0.905, 0.9), (0.9, 0.9, 0.9, 0.1)])
def test_two_replicates_have_intervals_however_wide(scores: tuple[float, ...]) -> None:
    tried = [("lora", 0), ("lora", 1), ("pissa", 0), ("pissa", 1)]
    row = row_of(
        compare([record(v, 1e-2, s, x, x) for (v, s), x in zip(tried, scores, strict=True)]), "pissa"
    )
    assert -1 <= row["difference_low"] <= row["difference_high"] <= 1
    assert (row["outcome"], row["counts"], row["pairs"]) == ("undecided", "open", 2)


def test_one_replicate_has_no_interval_and_equal_differences_have_none() -> None:
    one = compare(tuned_records(TWO, replicates=1))
    assert one.verdicts["outcome"].tolist() == ["undecided"]
    assert not has_interval(row_of(one, "pissa"))
    assert len(one.fixed_rate) == 0
    assert "(1 replicate is usable for both)" in one.verdicts["answer"][0]
    same = compare([record(v, 1e-2, s, 0.5) for v in TWO for s in range(3)])
    assert "pissa +0.0 (the same difference in every replicate)" in same.verdicts["answer"][0]


def test_while_runs_are_missing_only_whole_tunings_count() -> None:
    records = tuned_records(EQUAL, replicates=4)
    kept = [r for r in records if not is_of(r, "dora", 3)]
    found = analyze(study_of(records), kept[:-1])  # one run of hira's last replicate is missing, too
    assert task_of(found)["missing"]
    assert (row_of(found, "dora")["pairs"], row_of(found, "pissa")["pairs"]) == (3, 4)
    assert task_of(found)["replicates"] == 4
    assert not task_of(compare(records))["missing"]
    assert len(compare([r for r in records if not is_of(r, "lora")]).comparison) == 0, "no baseline was tuned"


def test_the_claim_over_several_tasks_corrects_for_their_number(tmp_path: Path) -> None:
    lower = {v: Truth(0.84, t.optimum) if v != "lora" else t for v, t in EQUAL.items()}
    records = [
        r for i, task in enumerate(("digits", "letters")) for r in tuned_records(lower, task=task, seed=i)
    ]
    found = compare(records)
    assert found.tuned["task"].tolist() == ["digits", "letters"]
    over, first, second = found.verdicts[:3].to_dict("records")
    assert (over["scope"], over["outcome"]) == ("2 tasks", "supported")
    assert (
        over["answer"] == "It holds on at least 2 of 2 tasks (2 needed; digits supported, letters supported)."
    )
    assert (first["scope"], second["scope"]) == ("digits", "letters")
    assert "NaN" not in json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("others", [{"full": Truth(0.95)}, {}])
def test_without_a_counted_variant_the_claim_is_descriptive(others: dict[str, Truth]) -> None:
    found = compare(tuned_records({"lora": Truth(), **others}, replicates=3))
    assert found.verdicts["outcome"].tolist() == ["descriptive"]
    assert (task_of(found)["counted"], task_of(found)["holds_at_least"]) == (0, 0)


def test_a_record_that_is_written_while_the_report_command_reads_is_in_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, *records = tuned_records(TWO, replicates=3)
    file = study_of([late, *records])
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    file.write(tmp_path / file.name)
    get = Store.get

    def get_and_put(opened: Store, fingerprint: str) -> Record | None:
        found = get(opened, fingerprint)
        store.put(late)
        return found

    with monkeypatch.context() as during_the_first:
        during_the_first.setattr(Store, "get", get_and_put)
        assert Report(output=tmp_path, study=file.name).run() == 0
    assert Report(output=tmp_path, study=file.name).run() == 0
    assert json.loads((tmp_path / file.name / "summary.json").read_text())["pending"] == 0


# -- claim 3

RATES = (1e-3, 1e-2, 1e-1)


def scores(means: tuple[float, float, float], seed: int, n: int = 6) -> Any:
    return np.array(means) + np.random.default_rng(seed).normal(0, 0.005, (n, 3))


LORA, HIRA = scores((0.5, 0.9, 0.0), 0), scores((0.1, 0.6, 0.9), 1)


def at_fixed_rate(
    margin: float = 0.01, chosen: Mapping[str, int] | None = None, **curves: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare curves with LoRA's curve.

    Args:
        margin: The smallest difference that matters.
        chosen: Variant -> index of its best rate; by default 1.
        **curves: Variant -> test scores, shape (replicates, rates).
    """
    places = {name: np.full(len(own), (chosen or {}).get(name, 1)) for name, own in curves.items()}
    return compare_at_fixed_rate(RATES, curves, places, "lora", margin)


def test_a_variant_with_another_best_rate_reverses_its_order() -> None:
    (row,), winners = at_fixed_rate(lora=LORA, hira=HIRA, chosen={"hira": 2})
    assert row["reversal"] is True
    assert row["regret"] == pytest.approx(0.3, abs=0.02)
    assert row["at_baseline_rate"] == pytest.approx(-0.3, abs=0.02)
    assert row["at_own_rate"] == pytest.approx(0.9, abs=0.02)
    assert [w["winner"] for w in winners] == ["lora", "lora", "hira"]
    assert [w["learning_rate"] for w in winners] == list(RATES)


def test_a_rate_at_which_all_variants_have_the_same_score_has_no_winner() -> None:
    _, winners = at_fixed_rate(lora=LORA * [1, 1, 0], hira=HIRA * [1, 1, 0], chosen={"hira": 2})
    assert [(w["learning_rate"], w["winner"]) for w in winners] == [(1e-3, "lora"), (1e-2, "lora")]


def test_a_variant_that_is_worse_everywhere_or_equal_everywhere_reverses_nothing() -> None:
    worse, equal = scores((0.3, 0.7, 0.0), 2), scores((0.5, 0.9, 0.0), 3)
    rows, _ = at_fixed_rate(0.02, lora=LORA, a=worse, b=equal)
    assert {row["variant"]: row["reversal"] for row in rows} == {"a": False, "b": False}


def test_noise_leaves_it_open_and_two_replicates_do_not_crash() -> None:
    noisy = LORA + np.random.default_rng(5).normal(0, 0.2, LORA.shape)
    rows, _ = at_fixed_rate(lora=LORA, a=noisy)
    assert [row["reversal"] for row in rows] == [None]
    assert len(at_fixed_rate(lora=LORA[:2], a=noisy[:2])[0]) == 1
    assert at_fixed_rate(lora=LORA) == ([], [])


def test_noise_at_one_rate_alone_excludes_a_reversal() -> None:
    """A reversal needs a loss at one rate and a win at the other rate. Here, both are equal at one rate."""
    generator = np.random.default_rng(6)
    means = np.tile([0.5, 0.9, 0.9], (6, 1))
    baseline, variant = means + generator.normal(0, 0.0005, (2, 6, 3))
    variant[:, 1] += [0.3, -0.3, 0.2, -0.2, 0.25, -0.25]
    (row,), _ = at_fixed_rate(lora=baseline, a=variant, chosen={"a": 2})
    assert row["at_baseline_rate_low"] < -0.01 < 0.01 < row["at_baseline_rate_high"]
    assert -0.01 < row["at_own_rate_low"] < row["at_own_rate_high"] < 0.01
    assert row["reversal"] is False


def test_variants_that_do_not_share_their_rates_are_not_compared_at_one() -> None:
    records = [
        record(v, rate, s, 0.5 + rate)
        for v, rates in (("lora", (1e-3, 1e-2)), ("hira", (1e-2, 1e-1)))
        for rate in rates
        for s in range(3)
    ]
    for found in (compare(records), analyze_curves(records)):
        assert len(found.fixed_rate) == 0
        assert len(found.verdicts) == 1


def test_the_curves_of_a_grid_show_it_too_and_say_that_they_are_descriptive() -> None:
    def claims(found: Results) -> list[str]:
        return found.verdicts.loc[found.verdicts["claim"].str.contains("fixed"), "outcome"].to_list()

    found = analyze_curves(study())
    assert set(found.winners["winner"]) >= {"hira", "pissa"}
    assert claims(found) == ["descriptive"]
    alone = analyze_curves([r for r in study() if not is_of(r, "lora")])
    assert claims(alone) == [], "there is no LoRA to take the rate from"


@pytest.mark.parametrize("kept", [0, 3])
def test_a_study_without_a_whole_tuning_of_the_baseline_has_a_report(tmp_path: Path, kept: int) -> None:
    """After an interruption, the baseline may have no record, or fewer rates than the other variants."""
    records = tuned_records({"lora": Truth(), "pissa": Truth()}, replicates=2)
    of_lora = [r for r in records if r.configuration.variant.name == "lora"]
    found = [r for r in records if r not in of_lora] + of_lora[:kept]
    results, _ = write_report(study_of(records), found, tmp_path / "study", "")
    assert results.comparison.empty
    assert (tmp_path / "study" / "report.html").exists()


def test_a_range_that_the_grids_do_not_leave_is_at_least_that_wide(tmp_path: Path) -> None:
    rates = [float(f"{10 ** (i / 4):.3g}") for i in range(-16, -5)]
    same = [
        record(v, rate, s, 0.9 + 0.001 * s) for v in ("lora", "pissa") for rate in rates for s in range(2)
    ]
    found = compare(same)
    row, rates_of = row_of(found, "pissa"), found.pooled.groupby("variant")["learning_rate"]
    assert row["width_is_bound"]
    assert row["width"] == pytest.approx(math.log10(rates_of.max()["pissa"] / rates_of.min()["pissa"]))
    _, sections = write_report(study_of(same), same, tmp_path / "study", "")
    table = next(each.table for each in sections if each.name == "glance")
    assert table is not None
    assert f"≥{row['width']:.2f}" in table.rows[1]


def test_a_study_of_two_tasks_names_one_command(tmp_path: Path) -> None:
    clear = tuned_records({"lora": Truth(), "pissa": Truth(0.8)}, 6, task="digits")
    noisy = tuned_records({"lora": Truth(), "pissa": Truth()}, 6, noise=0.01, task="letters")
    found = [*clear, *noisy]
    _, sections = write_report(study_of(found), found, tmp_path / "study", "")
    (step,) = (each for each in sections if each.command and "--replicates" in each.command)
    assert (step.name, "replicates decide" in step.step) == ("next", True)
    assert json.loads((tmp_path / "study" / "summary.json").read_text())["next"] == {
        "step": step.step,
        "command": step.command,
    }
