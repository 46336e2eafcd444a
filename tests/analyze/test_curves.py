"""Curves: values computed by hand, invariances, stopped runs, and the run that export takes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import RATES, analyze_curves, record, study

from orchestrator.analyze import curves
from orchestrator.analyze.analysis import analyze
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile

NAN = math.nan
X = np.array([-4.0, -3.0, -2.0, -1.0])
Y = st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=3, max_size=9).map(np.array)
Tables = dict[str, list[list[Any]]]
SHAPE = ("width", "width_90", "lost_near", "lost")


def rows(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Analyze a study with one panel, and return curve -> its row in `best`."""
    found = analyze_curves(records)
    assert len(found.panels) == 1
    return {row["curve"]: row for row in found.best.to_dict("records")}


def only(records: Sequence[Record]) -> dict[str, Any]:
    (row,) = rows(records).values()
    return row


def seeds(scores: Mapping[float, Sequence[Any]], variant: str = "lora", **more: Any) -> list[Record]:
    """Return the records of one curve.

    Args:
        scores: Learning rate -> the score of each seed. None is a diverged run. "stopped" or "failed" is the
            state of a run without a final score.
        variant: The variant.
        **more: Further arguments of `record`.
    """
    return [
        record(variant, rate, seed, 0.1, state=score, **more)
        if isinstance(score, str)
        else record(variant, rate, seed, score, **more)
        for rate, own in scores.items()
        for seed, score in enumerate(own)
    ]


# -- points and best points


def test_the_rehearsed_study_gives_the_means_that_were_measured() -> None:
    found = analyze_curves(study())
    means = found.points.sort_values("learning_rate").groupby("curve")["validation_score"]
    assert [round(v, 2) for v in means.get_group("lora")] == [0, 0.01, 0.21, 0.97, 0, 0, 0]
    assert [round(v, 2) for v in means.get_group("hira")] == [0, 0, 0, 0, 0.26, 0.95, 0]
    # Sorted by score.
    best = {"pissa": 3e-3, "lora": 1e-2, "hira": 1e-1, "lora-plus": 1e-3, "rslora": 1e-2}
    assert list(zip(found.best["curve"], found.best["learning_rate"], strict=True)) == list(best.items())
    assert (found.best["bracket"] == "yes").all()
    chosen = found.points[found.points["is_best"]]
    assert dict(zip(chosen["curve"], chosen["learning_rate"], strict=True)) == best


def test_a_diverged_run_counts_as_the_floor_and_a_score_that_is_not_finite_is_missing() -> None:
    point = analyze_curves(seeds({1e-2: (0.9, None, 0.7)}, floor=0.1)).points.iloc[0]
    assert point["validation_score"] == pytest.approx((0.9 + 0.1 + 0.7) / 3)
    assert (point["scored"], point["usable"], point["diverged"], point["seeds"]) == (3, 2, 1, 3)
    low, high = stats.t.interval(0.95, 2, point["test_score"], stats.sem([0.9, 0.1, 0.7]))
    assert (point["test_score_low"], point["test_score_high"]) == (max(0, low), min(1, high))
    point = analyze_curves(seeds({1e-2: (NAN, 0.5)})).points.iloc[0]
    assert (point["scored"], point["validation_score"]) == (1, 0.5)


def test_a_stopped_run_is_in_no_mean_and_is_not_chosen_and_bounds_the_width() -> None:
    found = analyze_curves(seeds({1e-3: (0.5, 0.5), 1e-2: (0.6, 0.6), 1e-1: (0.9, "stopped")}))
    last = found.points.set_index("learning_rate").loc[1e-1]
    assert (last["scored"], last["validation_score"], last["usable"], last["stopped"]) == (1, 0.9, 1, 1)
    assert not last["eligible"]
    (best,) = found.best.to_dict("records")
    assert (best["learning_rate"], best["bracket"]) == (1e-2, "yes")  # the stopped neighbor counts as worse
    assert best["width_is_bound"]
    assert math.isnan(best["width_low"])
    assert any("not stopped early score higher" in warning for warning in found.warnings)


def test_the_choice_among_stopped_runs_is_repeated_without_each_seed() -> None:
    found = analyze_curves(seeds({1e-2: (0.5, 0.5, 0.5), 1e-1: (0.9, 0.9, "stopped")}))
    # (0.9 + 0.9 + 0) / 3 is more than 0.5. Without the first seed, (0.9 + 0) / 2 is less than 0.5.
    (best,) = found.best.to_dict("records")
    assert best["learning_rate"] == 1e-1
    assert best["rates_without_a_seed"] == [1e-2, 1e-2, 1e-1]
    assert any("another rate would have been chosen" in w for w in found.warnings)


def test_a_rate_where_all_runs_diverged_is_not_chosen_if_every_other_rate_has_stopped_runs() -> None:
    stopped = {1e-3: (0.501, 0.501, "stopped"), 1e-2: (0.51, 0.51, "stopped")}
    found = only(seeds({**stopped, 1e-1: (None, None, None)}))
    assert (found["learning_rate"], found["cliff"]) == (1e-2, 1e-1)
    none = seeds({1e-3: ("stopped", "stopped"), 1e-2: (None, None), 1e-1: (None, None)})
    assert only(none)["learning_rate"] == 1e-2, "nothing finished: the floor is all there is"
    edges = only(seeds({1e-3: ("stopped", "stopped"), 1e-2: (0.9, 0.9), 1e-1: ("stopped", "stopped")}))
    assert (edges["bracket"], edges["width"], edges["width_is_bound"]) == ("yes", 0.0, True)


def test_a_failed_run_is_missing_and_the_curve_is_drawn_across_a_rate_of_failed_runs() -> None:
    scores = {1e-4: (0.0, 0.0), 1e-3: ("failed", "failed"), 1e-2: (0.8, 0.8), 1e-1: (0.0, 0.0)}
    found = analyze_curves(seeds(scores))
    point = found.points.set_index("learning_rate").loc[1e-3]
    assert (point["scored"], point["failed"], point["eligible"]) == (0, 2, False)
    assert math.isnan(point["validation_score"])
    # From .8 at 1e-2, the curve falls linearly to 0 at 1e-4, two decades below, and to 0 at 1e-1, one decade
    # above.
    widths = found.best[["width", "width_90"]].iloc[0]
    assert list(widths) == pytest.approx([0.01 / 0.4 + 0.01 / 0.8, 0.08 / 0.4 + 0.08 / 0.8])
    alone = only(seeds({1e-2: ("failed",)}))
    assert all(math.isnan(alone[name]) for name in ("learning_rate", "validation_score", *SHAPE))


def test_one_seed_gives_numbers_without_an_interval_and_a_warning() -> None:
    found = analyze_curves([r for r in study() if r.configuration.seed == 0])
    assert found.best[[*SHAPE, "validation_score", "gain"]].notna().all(axis=None)
    for name in (*SHAPE, "validation_score", "test_score", "gain"):
        assert found.best[[f"{name}_low", f"{name}_high"]].isna().all(axis=None)
    assert all(not rates for rates in found.best["rates_without_a_seed"])
    assert any("one seed at the best rate" in w for w in found.warnings)


def test_the_gain_is_the_test_score_at_the_rate_that_validation_chose() -> None:
    # The test score is higher at 1e-3, the validation score at 1e-2.
    records = [record(rate=1e-3, seed=s, validation=0.5, test=0.99, untrained=0.2) for s in range(3)]
    tests = (0.6, 0.7, 0.65)
    records += [record(rate=1e-2, seed=s, validation=0.8, test=t, untrained=0.2) for s, t in enumerate(tests)]
    found, gains = only(records), [t - 0.2 for t in tests]
    assert found["learning_rate"] == 1e-2
    assert found["gain"] == pytest.approx(0.45)
    assert not found["nothing_learned"]
    assert only(seeds({1e-2: (0.2, 0.2)}, untrained=0.2))["nothing_learned"]
    expected = stats.t.interval(0.95, 2, sum(gains) / 3, stats.sem(gains))
    assert (found["gain_low"], found["gain_high"]) == pytest.approx(expected)


# -- the rate at which curves are compared


def test_regrets_by_hand() -> None:
    records = seeds({1e-3: (0.2, 0.2), 1e-2: (0.8, 0.8), 1e-1: (0.5, 0.5)})
    records += seeds({1e-3: (0.9, 0.9), 1e-2: (0.6, 0.6), 1e-1: (0.1, 0.1)}, "pissa")
    (panel,) = analyze_curves(records).panels.to_dict("records")
    assert [panel[f"common_{name}"] for name in ("rate", "label")] == [1e-2, "LoRA's best rate"]
    assert panel["reference"] == "lora"
    found = [rows(records)[variant] for variant in ("lora", "pissa")]
    assert [row["lost"] for row in found] == pytest.approx([0.0, 0.3])
    assert [row["test_at_common_rate"] for row in found] == pytest.approx([0.8, 0.6])
    assert [row["test_score"] for row in found] == pytest.approx([0.8, 0.9])


def test_a_score_at_the_common_rate_is_interpolated_inside_the_grid_and_unknown_outside() -> None:
    others = seeds({10**-2.5: (0.4,), 10**-1.5: (0.6,)}, "hira")
    others += seeds({1e-4: (0.9,), 1e-3: (0.7,)}, "pissa")
    found = rows([*seeds({1e-3: (0.1,), 1e-2: (0.9,), 1e-1: (0.2,)}), *others])
    for name, expected in (("lost", 0.1), ("test_at_common_rate", 0.5)):
        assert found["hira"][name] == pytest.approx(expected)
        assert math.isnan(found["pissa"][name])
    common = analyze_curves(others).panels["common_rate"]
    assert common.isna().all(), "without LoRA, and without a rate that all have"


def test_without_lora_the_rate_best_on_average_is_the_common_one() -> None:
    found = analyze_curves([r for r in study() if r.configuration.variant.name in ("pissa", "rslora")])
    (panel,) = found.panels.to_dict("records")
    assert (panel["reference"], panel["common_rate"]) == ("", 3e-3)
    assert panel["common_label"] == "the rate best on average"
    lost = found.best.set_index("curve")["lost"]
    assert lost["pissa"] == 0.0
    assert lost["rslora"] == pytest.approx((0.89 + 0.96 + 0.26 - 0.58 - 0.75 - 0.68) / 3)


def test_a_variant_of_a_user_called_like_lora_in_the_survey_is_not_the_reference() -> None:
    records = [record("lora", 1e-3, validation=0.6), record("LoRA", 1e-2, validation=0.9)]
    (panel,) = analyze_curves(records).panels.to_dict("records")
    assert (panel["reference"], panel["common_rate"]) == ("lora", 1e-3)


# -- invariances


def tables(rates: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[Tables]:
    """Return a strategy for variant -> the scores of the seeds at each learning rate.

    Args:
        rates: A strategy for the scores of the seeds at one learning rate.
    """
    variants = st.sampled_from(("lora", "dora", "pissa", "rslora", "dense", "hira"))
    return st.dictionaries(variants, st.lists(rates, min_size=2, max_size=6), min_size=3)


@settings(max_examples=settings.default.max_examples // 10)  # each example analyzes 105 records
@given(st.integers(0, 2**32))
def test_the_order_of_records_and_repeats_change_nothing(seed: int) -> None:
    records = study()
    shuffled = [*records, *records[::7]]
    random.Random(seed).shuffle(shuffled)
    expected, found = analyze_curves(records), analyze_curves(shuffled)
    assert json.dumps(found.to_json()) == json.dumps(expected.to_json())
    pd.testing.assert_frame_equal(found.runs, expected.runs, check_exact=True)


@settings(max_examples=settings.default.max_examples // 10)
@example({"lora": [[0, 0, 4], [0, 0, 2]]}, -2)  # the score falls exactly half of the way to the floor
@given(tables(st.lists(st.integers(0, 64), min_size=3, max_size=3)), st.sampled_from([-2, 1, 4]))
def test_adding_a_constant_to_every_score_changes_the_scores_only(scores: Tables, constant: int) -> None:
    def of(shift: int) -> dict[str, dict[str, Any]]:
        records, base = [], {"floor": float(shift), "untrained": float(shift)}
        for variant, table in scores.items():
            moved = [[v / 64 + shift for v in row] for row in table]
            records += seeds(dict(zip(RATES, moved, strict=False)), variant, **base)
        return rows(records)

    before, after = of(0), of(constant)
    assert before.keys() == after.keys()
    same = ["learning_rate", "rates", "bracket", "cliff", "rates_without_a_seed", "nothing_learned"]
    same += ["width_is_bound", "width_90_is_bound"]
    for plain, moved in ((before[variant], after[variant]) for variant in before):
        assert [str(moved[name]) for name in same] == [str(plain[name]) for name in same]
        assert moved["gain"] == pytest.approx(plain["gain"])
        assert moved["validation_score"] == pytest.approx(plain["validation_score"] + constant)
        for name in SHAPE:
            assert moved[name] == pytest.approx(plain[name], abs=1e-9, nan_ok=True)


# -- points with stopped runs

SCORES = st.floats(0, 1)
OUTCOMES = st.lists(st.tuples(st.lists(SCORES, max_size=4), st.integers(0, 4)), min_size=1, max_size=6)


def choosable(outcomes: Sequence[tuple[Sequence[float], int]], floor: float = 0.0) -> list[bool]:
    """Return which points may be chosen.

    Args:
        outcomes: For each point, the scores of its runs and the number of its stopped runs.
        floor: The score of a constant answer.
    """
    points = [(sum(s) / len(s) if s else NAN, len(s), stopped, floor) for s, stopped in outcomes]
    frame = pd.DataFrame(points, columns=["validation_score", "scored", "stopped", "floor"])
    return [bool(each) for each in curves.choosable(frame)]


def test_a_point_with_stopped_runs_is_eligible_if_no_outcome_of_them_could_change_the_choice() -> None:
    assert choosable([([0.5, 0.5], 0), ([0.6, 0.6], 0)]) == [True, True]
    # The second point reaches at least 0.45, the first one has 0.5.
    assert choosable([([0.5, 0.5], 0), ([0.9], 1)]) == [True, False]
    assert choosable([([0.5, 0.5], 0), ([0.9], 1)], floor=0.3) == [True, True]
    # The scheduler stopped no run of the worst point.
    assert choosable([([0.0, 0.0], 0), ([0.9], 1)]) == [True, True]
    # The second point reaches at least 0.45, which is not better than the first one.
    assert choosable([([0.45, 0.45], 0), ([0.9], 1)]) == [True, False]
    assert choosable([([0.9, 0.8], 1), ([0.9, 0.9], 1), ([1.0], 2)]) == [False, True, False]
    assert choosable([([0.9, 0.9], 1), ([0.9, 0.9], 1)]) == [True, True]
    # All runs of the first point were stopped, all runs of the second one failed.
    assert choosable([([], 3), ([], 0)]) == [False, False]
    # One run diverged and the others were stopped, so that no score is above the floor.
    assert choosable([([0.0], 2), ([], 3)]) == [False, False]
    assert choosable([([0.0, 0.0], 0), ([0.0], 2)]) == [True, False]


@given(outcomes=OUTCOMES, data=st.data())
def test_the_choice_beats_every_complete_point_whatever_its_stopped_runs_would_have_scored(
    outcomes: list[tuple[list[float], int]], data: st.DataObject
) -> None:
    eligible = choosable(outcomes)
    complete_means = [sum(scores) / len(scores) for scores, stopped in outcomes if scores and not stopped]
    for (scores, stopped), usable in zip(outcomes, eligible, strict=True):
        if scores and not stopped:
            assert usable
        elif usable:
            final_scores = [data.draw(SCORES) for _ in range(stopped)]
            mean = (sum(scores) + sum(final_scores)) / (len(scores) + stopped)
            assert all(mean > other for other in complete_means)
    if any(not stopped or max(scores) > 0.1 for scores, stopped in outcomes if scores):
        assert any(eligible)


# -- the lane that export takes


def test_of_equal_lanes_that_of_lora_comes_first_and_then_the_first_by_name() -> None:
    scores = {"pissa": 0.5, "dora": 0.5, "lora": 0.5, "hira": 0.9, "rslora": 0.1}
    lanes = analyze_curves([record(name, validation=score) for name, score in scores.items()]).best_lanes
    assert list(lanes["variant"]) == ["hira", "lora", "dora", "pissa", "rslora"]
    equal = seeds({1e-3: (0.5, 0.5, 0.5, 0.5), 1e-2: (0.5, 0.5, 0.5, 0.5)})
    assert list(analyze_curves(equal).best_lanes["fingerprint"]) == [equal[0].fingerprint], "rate, then seed"


@pytest.mark.parametrize("setting", [{}, {"alpha": 32.0}, {"steps": 99}])
def test_export_takes_a_run_of_the_point_that_the_report_calls_the_best(setting: dict[str, Any]) -> None:
    """Export chooses by the best mean, not by the best run. A stopped run affects its own curve alone."""
    records = seeds({1e-2: (0.8, 0.8)}) + seeds({1e-2: (0.95, 0.1)}, "dora")
    if setting:
        records = seeds({1e-3: (0.4, 0.4), 1e-2: (0.95, "stopped")}) + seeds({1e-3: (0.7, 0.7)}, **setting)
    found = analyze_curves(records)
    reported = found.best.sort_values("validation_score", ascending=False).iloc[0]
    assert found.best_lanes["fingerprint"].iloc[0] == reported["fingerprint"]


RUNS = st.sampled_from([0.0, 0.25, 0.5, 0.75, None, "stopped", "failed"])
KINDS = st.sampled_from(["curve", "search", "replicates"])


@settings(max_examples=settings.default.max_examples // 5)
@given(tables(st.lists(RUNS, min_size=1, max_size=3)), KINDS)
def test_report_and_export_agree_on_the_best_run(scores: Tables, kind: Any) -> None:
    curves = [(variant, dict(zip(RATES, table, strict=False))) for variant, table in scores.items()]
    records = [each for variant, own in curves for each in seeds(own, variant)]
    found = analyze(StudyFile("t", "?", "c", settings=AnalysisSettings(kind=kind)), records)
    scored = found.best.dropna(subset=["learning_rate"]).set_index("group")
    chosen = found.points[found.points["is_best"]].set_index("group")
    for name in ("point", "learning_rate", "validation_score", "fingerprint"):
        assert scored[name].to_dict() == chosen[name].to_dict()
    finished = set(found.runs.loc[found.runs["state"] == "finished", "fingerprint"])
    assert set(scored["fingerprint"]) <= finished | {""}
    if kind != "replicates":
        trained = scored[scored["fingerprint"] != ""].set_index("variant")["fingerprint"]
        lanes = found.best_lanes.set_index("variant")["fingerprint"].to_dict()
        assert {variant: lanes[variant] for variant in trained.index} == trained.to_dict()


# -- the shape of one curve


def test_the_best_is_the_highest_and_the_lowest_rate_among_equals() -> None:
    for y, best in (([0.1, 0.9, 0.9, 0.2], 1), ([NAN, 0.3, NAN], 1), ([NAN], None)):
        assert curves.best_index(np.array(y)) == best


def test_the_best_rate_is_bracketed_unless_an_end_of_the_grid_scores_the_same() -> None:
    curve = {(0.1, 0.9, 0.2): "yes", (0.9, 0.5, 0.2): "low edge", (0.1, 0.5, 0.9): "high edge"}
    curve |= {(0.1, 0.9, 0.9): "high edge", (0.0, 0.0, 0.0): "both edges"}
    curve[NAN, 0.9, NAN] = "yes"  # rates that were stopped early count as worse
    for y, expected in curve.items():
        assert curves.bracket(np.array(y), curves.best_index(np.array(y))) == expected


def test_the_score_is_linear_between_rates_and_unknown_beside_a_stopped_one() -> None:
    y = np.array([0.0, 0.4, 0.8, NAN])
    assert curves.score_at(X, y, -2.5) == pytest.approx(0.6)
    assert curves.score_at(X, y, -2.0) == 0.8
    assert all(math.isnan(curves.score_at(X, y, x)) for x in (-1.5, -1.0, -5.0, 0.0))


def test_widths_by_hand() -> None:
    def width(y: Sequence[float], best: int, threshold: float, x: Sequence[float] = X) -> tuple[Any, bool]:
        found, is_bound = curves.width(np.array(x), np.array(y), best, threshold)
        return pytest.approx(found), is_bound

    # The score .7 is a quarter of the way to .4 and an eighth of the way to 0.
    assert width([0.0, 0.4, 0.8, 0.0], 2, 0.7) == (0.25 + 0.125, False)
    # Up to the end of the grid or to a stopped rate it is a bound.
    assert width([0.0, 0.4, 0.8, 0.79], 2, 0.6) == (1.5, True)
    assert width([0.0, 0.4, 0.8, NAN], 2, 0.6) == (0.5, True)
    assert width([0.5], 0, 0.4, X[:1]) == (0.0, True)
    # Without a tolerance for rounding, the two scores of .09 would be too low by 1e-17.
    assert 0.1 - 0.01 > 0.09
    assert width([0.09, 0.09, 0.1, 0.0], 2, 0.1 - 0.01) == (2.1, True)
    # A second hill beyond a dip does not widen.
    assert width([0.0, 0.8, 0.0, 0.79, 0.0], 1, 0.4, [-4, -3, -2, -1, 0]) == (1.0, False)


def test_rounding_decides_no_tie_no_edge_and_no_cliff() -> None:
    almost, calm = 0.1 + 0.2, np.zeros(2)  # .30000000000000004
    y = np.array([0.3, almost, 0.1])
    assert curves.best_index(y) == 0
    assert curves.bracket(y, 1) == "low edge"
    assert curves.cliff_index(np.array([almost + 0.3, almost]), calm, 0, 0.0) == 1
    # Half of .6 is .3, which is less than `almost` by rounding only.
    assert curves.cliff_index(np.array([0.6, almost]), calm, 0, 0.0) == 1
    # The best score exceeds the floor by rounding only.
    assert curves.cliff_index(np.array([almost, 0.0]), calm, 0, 0.3) is None
    rates = only(seeds({1e-3: (0.3,), 1e-2: (almost,), 1e-1: (0.1,)}))
    assert (rates["learning_rate"], rates["rates"]) == (1e-3, "1e-3 = 1e-2")


def test_the_mean_loss_within_half_a_decade() -> None:
    # The score falls by .4 per decade to the left and by .8 to the right. The mean loss over half a decade is
    # .1 on the left and .2 on the right, and .15 over both.
    assert curves.mean_loss_near(X, np.array([0.0, 0.4, 0.8, 0.0]), 2) == pytest.approx((0.1 + 0.2) / 2)
    assert curves.mean_loss_near(X[:3], np.array([0.0, 0.4, 0.8]), 2) == pytest.approx(0.1)
    assert curves.mean_loss_near(X, np.array([0.0, 0.4, 0.8, NAN]), 2) == pytest.approx(0.1)
    assert math.isnan(curves.mean_loss_near(np.array([-3.0]), np.array([0.8]), 0))
    x, y = np.array([-1.0, -0.75, -0.5, 0.0, 0.5]), np.array([0.0, 0.1, 0.3, 1.0, 0.2])
    inside = np.linspace(-0.5, 0.5, 100_001)
    expected = 1.0 - float(np.trapezoid(np.interp(inside, x, y), inside))
    assert curves.mean_loss_near(x, y, 3) == pytest.approx(expected, abs=1e-6)


def test_the_cliff_is_the_first_rate_above_the_best_at_which_training_breaks_down() -> None:
    y, calm = np.array([0.2, 0.8, 0.5, 0.1]), np.zeros(4)
    assert curves.cliff_index(y, calm, 1, 0.0) == 3
    # With this floor, the score at index 2 has fallen half of the way.
    assert curves.cliff_index(y, calm, 1, 0.2) == 2
    assert curves.cliff_index(y, np.array([0.0, 0.0, 0.67, 1.0]), 1, 0.0) == 2
    assert curves.cliff_index(np.array([0.2, 0.8, 0.7]), calm[:3], 1, 0.0) is None
    # No score is above the floor.
    assert curves.cliff_index(np.zeros(3), calm[:3], 0, 0.0) is None


@given(Y, st.integers(1, 31).map(lambda n: n / 64), st.integers(-8, 8))
def test_a_constant_leaves_best_and_width_alone_and_a_larger_tolerance_never_narrows(
    y: np.ndarray, tolerance: float, constant: int
) -> None:
    x, best = 0.5 * np.arange(len(y)), curves.best_index(y)
    assert curves.best_index(y + constant) == best
    narrow, wide = (curves.width(x, y, best, y[best] - t) for t in (tolerance, 2 * tolerance))
    assert curves.width(x, y + constant, best, y[best] + constant - tolerance) == narrow
    assert 0 <= narrow[0] <= wide[0] + 1e-12
    assert wide[0] <= x[-1] - x[0]


@given(Y)
def test_a_mirrored_curve_has_the_same_width_and_loss(y: np.ndarray) -> None:
    y = np.array([*y, 2.0, *y[:0:-1]])  # There is one peak, because the choice in a tie depends on the order.
    x, best, mirrored = 0.3 * np.arange(len(y)), curves.best_index(y), curves.best_index(y[::-1])
    back = y[::-1]
    assert curves.width(x, y, best, 1.9)[0] == pytest.approx(curves.width(x, back, mirrored, 1.9)[0])
    assert curves.mean_loss_near(x, y, best) == pytest.approx(curves.mean_loss_near(x, back, mirrored))
