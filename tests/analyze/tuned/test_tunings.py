"""Tunings: their runs, the chosen run, and the curves over all runs of a variant."""

from __future__ import annotations

from synthetic import record
from tuned_records import Truth, shifted_rates, tuned_records

from orchestrator.analyze.run_labels import label_runs
from orchestrator.analyze.tuned.pooled_curve import pool_curve
from orchestrator.analyze.tuned.tunings import Tuning, find_tunings
from orchestrator.record.schema import Record


def only_tuning(*records: Record) -> Tuning:
    (tuning,) = find_tunings(records, label_runs(records))[0]["lora"].values()
    return tuning


def test_validation_alone_chooses_and_ties_go_to_the_lowest_rate() -> None:
    tuning = only_tuning(
        record(rate=1e-3, validation=0.7, test=0.1),
        record(rate=1e-2, validation=0.8, test=0.5),
        record(rate=3e-2, validation=0.8, test=0.9),
    )
    assert tuning.chosen is not None
    assert (tuning.chosen.learning_rate, tuning.chosen.test) == (1e-2, 0.5)
    assert tuning.edges == ("learning_rate (high edge)",), "the highest rate is as good"


def test_a_diverged_run_counts_as_the_floor_and_a_stopped_or_failed_one_is_not_chosen() -> None:
    tuning = only_tuning(
        record(rate=1e-3, validation=0.2),
        record(rate=1e-2, validation=None, floor=0.0),
        record(rate=3e-2, validation=0.9, state="stopped"),
        record(rate=1e-1, validation=None, state="failed"),
    )
    assert tuning.chosen is not None
    assert tuning.chosen.learning_rate == 1e-3
    assert [run.label for run in tuning.runs] == ["finished", "diverged", "stopped", "failed"]
    assert [run.validation for run in tuning.runs] == [0.2, 0.0, None, None]
    nothing = only_tuning(record(rate=1e-2, validation=None))
    assert nothing.chosen is not None
    assert not nothing.is_usable, "the only run is chosen, and is not usable"


def test_each_seed_is_a_tuning_and_incomplete_ones_are_left_out() -> None:
    records = [record(rate=rate, seed=s, validation=0.5) for s in range(3) for rate in (1e-3, 1e-2)][:-1]
    labels = label_runs(records)
    tunings, left_out = find_tunings(records, labels)
    assert (list(tunings["lora"]), left_out) == ([0, 1], 1)


def test_while_runs_are_missing_a_variant_with_fewer_runs_than_the_others_has_no_whole_tuning() -> None:
    tried = [("lora", 1e-3), ("lora", 1e-2), ("pissa", 1e-3)]
    records = [record(v, rate=rate, seed=s, validation=0.5) for v, rate in tried for s in range(2)]
    for missing, whole in ((True, 0), (False, 2)):
        tunings, left_out = find_tunings(records, label_runs(records), missing)
        assert (len(tunings["lora"]), len(tunings["pissa"]), left_out) == (2, whole, 2 - whole)


def test_the_pooled_curve_finds_the_optimum_between_the_rates_of_any_one_grid() -> None:
    records = tuned_records({"lora": Truth(optimum=-1.87)}, replicates=12, noise=0.001)
    tunings = list(find_tunings(records, label_runs(records))[0]["lora"].values())
    curve = pool_curve(tunings, 0.02)
    assert curve is not None
    assert sum(curve.runs) == 12 * len(shifted_rates(0))
    assert abs(curve.best_rate / 10**-1.87 - 1) < 0.15
    assert curve.is_interpolated
    assert not curve.is_at_edge
    assert curve.width is not None
    assert 0.4 < curve.width < 0.9, "within 0.02 of the top: 0.32 decades below it and up to 0.32 above"
    sharp = pool_curve(tunings, 0.0001)
    assert sharp is not None
    assert sharp.width is None, "narrower than the bins: not resolved"
