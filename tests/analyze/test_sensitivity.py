"""Curves and their statistics, with synthetic records."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import RATES, record, study, summarize_curves

from orchestrator.analyze.results import Curve, Panel
from orchestrator.record.schema import Provenance, Record


def only(records: list[Record]) -> Panel:
    (panel,) = summarize_curves(records).panels
    return panel


def curve(panel: Panel, label: str) -> Curve:
    return next(c for c in panel.curves if c.label == label)


def test_the_rehearsed_study_gives_the_means_that_were_measured() -> None:
    panel = only(study())
    means = {c.label: [round(p.validation.mean or 0, 2) for p in c.points] for c in panel.curves}
    assert means["lora"] == [0, 0.01, 0.21, 0.97, 0, 0, 0]
    assert means["hira"] == [0, 0, 0, 0, 0.26, 0.95, 0]
    assert {c.label: c.best_rate for c in panel.curves} == {
        "lora": 1e-2,
        "rslora": 1e-2,
        "lora-plus": 1e-3,
        "pissa": 3e-3,
        "hira": 1e-1,
    }
    assert all(c.bracketed == "yes" for c in panel.curves)
    assert [c.label for c in panel.curves] == ["pissa", "lora", "hira", "lora-plus", "rslora"]


def test_a_diverged_run_counts_as_the_floor_with_its_share_and_the_mean_of_the_rest() -> None:
    point = (
        only([record(seed=s, validation=v, floor=0.1) for s, v in enumerate((0.9, None, 0.7))])
        .curves[0]
        .points[0]
    )
    assert point.validation.mean == pytest.approx((0.9 + 0.1 + 0.7) / 3)
    assert point.test.n == 3
    assert point.without_diverged.mean == pytest.approx(0.8)
    assert point.diverged_share == pytest.approx(1 / 3)
    found = stats.binomtest(1, 3).proportion_ci(method="wilson")
    assert point.diverged_interval is not None
    assert (point.diverged_interval.low, point.diverged_interval.high) == pytest.approx(
        (found.low, found.high)
    )


def test_a_stopped_run_is_in_no_mean_and_is_not_chosen_and_bounds_the_width() -> None:
    records = [record(rate=r, seed=s, validation=v) for r, v in ((1e-3, 0.5), (1e-2, 0.6)) for s in (0, 1)]
    records += [
        record(rate=1e-1, seed=0, validation=0.9),
        record(rate=1e-1, seed=1, validation=0.2, state="stopped"),
    ]
    found = only(records).curves[0]
    last = found.points[-1]
    assert (last.validation.n, last.validation.mean, last.states) == (1, 0.9, {"finished": 1, "stopped": 1})
    assert last.runs[1].last_validation == 0.2
    assert not last.eligible
    assert found.best_rate == 1e-2
    assert found.bracketed == "yes"  # The neighbor, which was stopped early, counts as worse.
    assert found.width is not None
    assert found.width.is_lower_bound
    assert found.width.interval is None
    assert any("not stopped early score higher" in warning for warning in summarize_curves(records).warnings)


def test_the_choice_among_stopped_runs_is_repeated_without_each_seed() -> None:
    records = [record(rate=1e-2, seed=s, validation=0.5) for s in (0, 1, 2)]
    records += [record(rate=1e-1, seed=s, validation=0.9) for s in (0, 1)]
    records += [record(rate=1e-1, seed=2, validation=0.1, state="stopped")]
    found = only(records).curves[0]
    # (0.9 + 0.9 + 0) / 3 is more than 0.5. Without the first seed, (0.9 + 0) / 2 is less than 0.5.
    assert found.best_rate == 1e-1
    assert found.best_rates_leave_one_out == (1e-2, 1e-2, 1e-1)
    assert any("another rate would have been chosen" in w for w in summarize_curves(records).warnings)


def test_a_rate_where_all_runs_diverged_is_not_chosen_if_every_other_rate_has_stopped_runs() -> None:
    records = [record(rate=r, seed=s, validation=0.5 + r) for r in (1e-3, 1e-2) for s in (0, 1)]
    records += [record(rate=r, seed=2, validation=0.1, state="stopped") for r in (1e-3, 1e-2)]
    records += [record(rate=1e-1, seed=s, validation=None) for s in (0, 1, 2)]
    found = only(records).curves[0]
    assert found.best_rate == 1e-2
    assert found.cliff == 1e-1
    none = [record(rate=r, seed=s, validation=None) for r in (1e-2, 1e-1) for s in (0, 1)]
    stopped = [record(rate=1e-3, seed=s, validation=0.1, state="stopped") for s in (0, 1)]
    assert only([*none, *stopped]).curves[0].best_rate == 1e-2, "nothing finished: the floor is all there is"


def test_a_failed_run_is_missing_and_the_curve_is_drawn_across_a_rate_of_failed_runs() -> None:
    records = [
        record(rate=r, seed=s, validation=v)
        for r, v in ((1e-4, 0.0), (1e-2, 0.8), (1e-1, 0.0))
        for s in (0, 1)
    ]
    records += [record(rate=1e-3, seed=s, validation=None, state="failed") for s in (0, 1)]
    found = only(records).curves[0]
    assert found.points[1].validation.n == 0
    assert found.points[1].diverged_interval is None
    # From .8 at 1e-2, the curve falls linearly to 0 at 1e-4, two decades below, and to 0 at 1e-1, one decade
    # above.
    assert found.width is not None
    assert found.width.value == pytest.approx(0.01 / 0.4 + 0.01 / 0.8)
    assert found.count_runs("failed") == 2


def test_the_final_one_of_two_records_of_a_configuration_counts() -> None:
    states = ("failed", "finished", "stopped")
    records = [record(validation=0.5, state=state) for state in states]  # type: ignore[arg-type]
    for order in (records, records[::-1]):
        assert summarize_curves(order).states == {
            "finished": 1,
            "collapsed": 0,
            "diverged": 0,
            "stopped": 0,
            "failed": 0,
        }


def test_one_seed_gives_numbers_without_an_interval_and_a_warning() -> None:
    summary = summarize_curves([r for r in study() if r.configuration.seed == 0])
    for c in summary.panels[0].curves:
        figures = (
            c.width,
            c.width_90,
            c.half_decade_regret,
            c.regret_at_reference_best,
            c.interpolated_best_rate,
        )
        assert all(f is not None and f.interval is None for f in figures)
        assert c.best_validation.interval is None
        assert c.gain_over_untrained.interval is None
        assert c.best_rates_leave_one_out == ()
    assert any("one seed at the best rate" in w for w in summary.warnings)


def test_the_gain_is_the_test_score_at_the_rate_that_validation_chose() -> None:
    # The test score is higher at 1e-3, the validation score at 1e-2.
    records = [record(rate=1e-3, seed=s, validation=0.5, test=0.99, untrained=0.2) for s in range(3)]
    tests = (0.6, 0.7, 0.65)
    records += [record(rate=1e-2, seed=s, validation=0.8, test=t, untrained=0.2) for s, t in enumerate(tests)]
    found = only(records).curves[0]
    gains = [t - 0.2 for t in tests]
    low, high = stats.t.interval(0.95, 2, sum(gains) / 3, stats.sem(gains))
    assert found.best_rate == 1e-2
    assert found.gain_over_untrained.mean == pytest.approx(0.45)
    assert found.gain_over_untrained.interval is not None
    assert (found.gain_over_untrained.interval.low, found.gain_over_untrained.interval.high) == pytest.approx(
        (low, high)
    )


def test_regrets_by_hand() -> None:
    scores = {"lora": (0.2, 0.8, 0.5), "pissa": (0.9, 0.6, 0.1)}
    records = [
        record(v, r, s, score)
        for v, curve_ in scores.items()
        for r, score in zip((1e-3, 1e-2, 1e-1), curve_, strict=True)
        for s in (0, 1)
    ]
    panel = only(records)
    assert (panel.reference, panel.reference_best_rate) == ("lora", 1e-2)
    assert panel.average_best_rate == 1e-2  # The means over the variants are .55, .7 and .3.
    pissa = curve(panel, "pissa")
    assert pissa.regret_at_reference_best is not None
    assert pissa.regret_at_reference_best.value == pytest.approx(0.3)
    assert curve(panel, "lora").regret_at_reference_best.value == 0.0  # type: ignore[union-attr]
    assert panel.spread_at_common is not None
    assert panel.spread_at_best is not None
    assert panel.spread_at_common.size == pytest.approx(0.2)
    assert (panel.spread_at_common.worst, panel.spread_at_common.best) == ("pissa", "lora")
    assert panel.spread_at_best.size == pytest.approx(0.1)


def test_a_score_at_the_common_rate_is_interpolated_inside_the_grid_and_unknown_outside() -> None:
    records = [record("lora", r, validation=v) for r, v in ((1e-3, 0.1), (1e-2, 0.9), (1e-1, 0.2))]
    records += [record("hira", r, validation=v) for r, v in ((10**-2.5, 0.4), (10**-1.5, 0.6))]
    records += [record("pissa", r, validation=v) for r, v in ((1e-4, 0.9), (1e-3, 0.7))]
    panel = only(records)
    hira = curve(panel, "hira").regret_at_reference_best
    assert hira is not None
    assert hira.value == pytest.approx(0.1)
    assert curve(panel, "pissa").regret_at_reference_best is None
    assert curve(panel, "pissa").test_at_common_rate is None
    assert panel.average_best_rate is None
    assert panel.spread_at_best is not None
    assert panel.spread_at_best.best == "lora"  # PiSSA has no score at the common rate.


def test_without_lora_the_rate_best_on_average_is_the_common_one() -> None:
    panel = only([r for r in study() if r.configuration.variant.name in ("pissa", "rslora")])
    assert panel.reference is None
    assert panel.common_rate == panel.average_best_rate == 3e-3
    assert all(c.regret_at_reference_best is None for c in panel.curves)


@settings(max_examples=settings.default.max_examples // 10)  # Each example summarizes 105 records twice.
@given(st.integers(0, 2**32))
def test_the_order_of_records_and_repeats_change_nothing(seed: int) -> None:
    records = study()
    shuffled = [*records, *records[::7]]
    random.Random(seed).shuffle(shuffled)
    assert summarize_curves(shuffled) == summarize_curves(records)


@example([[0, 0, 4], [0, 0, 2]], -2)  # The score falls exactly half of the way to the floor.
@given(
    st.lists(st.lists(st.integers(0, 64), min_size=3, max_size=3), min_size=2, max_size=6),
    st.sampled_from([-2, 1, 4]),
)
def test_adding_a_constant_to_every_score_changes_the_scores_only(
    table: list[list[int]], constant: int
) -> None:
    def of(shift: int) -> Curve:
        return only(
            [
                record(
                    rate=rate, seed=s, validation=v / 64 + shift, floor=float(shift), untrained=float(shift)
                )
                for rate, row in zip(RATES, table, strict=False)
                for s, v in enumerate(row)
            ]
        ).curves[0]

    plain, moved = of(0), of(constant)
    assert (moved.best_rate, moved.bracketed, moved.cliff) == (plain.best_rate, plain.bracketed, plain.cliff)
    assert moved.best_rates_leave_one_out == plain.best_rates_leave_one_out
    assert moved.gain_over_untrained.mean == pytest.approx(plain.gain_over_untrained.mean)
    assert moved.best_validation.mean == pytest.approx((plain.best_validation.mean or 0) + constant)
    for name in ("width", "width_90", "half_decade_regret"):
        before, after = getattr(plain, name), getattr(moved, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert after.value == pytest.approx(before.value, abs=1e-9)
            assert after.is_lower_bound == before.is_lower_bound


def test_differences_besides_rate_seed_and_variant_make_panels_or_labelled_curves() -> None:
    records = [record(rate=r, rank=k, steps=n) for r in (1e-3, 1e-2) for k in (8, 16) for n in (60, 80)]
    panels = summarize_curves(records).panels
    assert [dict(p.varied) for p in panels] == [
        {"rank": k, "steps_horizon": n} for k in (8, 16) for n in (60, 80)
    ]
    assert all(len(p.curves) == 1 and len(p.curves[0].points) == 2 for p in panels)
    # Curves that differ in alpha or a variant's own hyperparameters share a panel with LoRA.
    records = [record(), record("lora-plus", extra={"ratio": 4}), record("lora-plus", extra={"ratio": 16})]
    records += [record("hira", alpha=None), record("dense", rank=192)]
    panel = only(records)
    assert sorted(c.label for c in panel.curves) == [
        "dense",
        "hira",
        "lora",
        "lora-plus ratio=16",
        "lora-plus ratio=4",
    ]


def test_mixed_provenance_gives_one_warning_per_column() -> None:
    versions = {"torch": "2.12.0", "ray": "2.60.0"}
    kernels = "liger 0.8.5"
    other = Provenance("fedcba9", versions, device="cuda", kernels=kernels, lane_group_size=4, host="b")
    summary = summarize_curves([record(seed=0), record(seed=1, provenance=other)])
    mixed = [w for w in summary.warnings if "mix" in w]
    assert [w.split()[3].rstrip(":") for w in mixed] == ["commit", "device", "kernels", "torch"]
    assert "0123abc (1)" in mixed[0]
    failed = record(seed=1, validation=None, state="failed", provenance=other)
    assert not any("mix" in w for w in summarize_curves([record(seed=0), failed]).warnings)


def test_a_score_that_is_not_finite_is_missing() -> None:
    point = only([record(seed=0, validation=math.nan), record(seed=1, validation=0.5)]).curves[0].points[0]
    assert (point.validation.n, point.validation.mean) == (1, 0.5)


def test_a_study_without_records_has_an_empty_summary() -> None:
    assert summarize_curves([]).panels == ()
    found = only([record(validation=None, state="failed")]).curves[0]
    assert found.best_rate is None
    assert found.width is None
