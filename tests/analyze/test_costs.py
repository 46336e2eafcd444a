"""The costs of variants, the time of the trainers, and the training losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import DIVERGED, RATES, analyze_curves, record, study

from orchestrator.analyze.costs import MAX_BINS, loss_frame, time_use
from orchestrator.record.schema import Cost, Record, StepMetrics


def costly(found: Record, seconds: float, memory: int = 10**9, parameters: int = 1000) -> Record:
    return replace(found, cost=Cost(seconds, 0.5, 100, parameters, memory))


def test_a_row_has_the_means_of_finished_runs_and_the_sum_of_all() -> None:
    records = [
        costly(record("lora", 1e-3, 0, 0.9), 4.0, 2 * 10**9),
        costly(record("lora", 1e-3, 1, 0.7), 6.0, 3 * 10**9),
        costly(record("lora", 1e-1, 0, None), 1.0),
        costly(record("dora", 1e-3, 0, 0.5), 8.0),
    ]
    lora, dora = analyze_curves(records).costs.to_dict("records")
    assert (lora["variant"], lora["runs"], lora["train_seconds"]) == ("lora", 2, 5.0)
    assert (lora["evaluate_seconds"], lora["peak_memory"], lora["trainable_parameters"]) == (0.5, 3e9, 1000)
    assert lora["study_seconds"] == pytest.approx(4 + 6 + 1 + 3 * 0.5)
    assert (lora["test_score"], dora["test_score"]) == pytest.approx((0.8, 0.5))


def test_a_variant_without_a_finished_run_has_no_row() -> None:
    assert list(analyze_curves(study({"lora": ((0.5,),), "hira": (DIVERGED,)})).costs["variant"]) == ["lora"]
    assert analyze_curves(study({"hira": (DIVERGED,)})).costs.empty


def test_the_time_of_the_trainers_by_kind() -> None:
    times = {"train_seconds": 6.0, "evaluate_seconds": 3.0, "generate_seconds": 2.0, "start_seconds": 1.0}
    records = [
        replace(record("lora", 1e-3, 0, 0.9), cost=Cost(**times, other_seconds=0.5)),
        replace(record("lora", 1e-3, 1, 0.7), cost=Cost(train_seconds=3.0, other_seconds=6.5)),
        replace(record("dora", 1e-3, 0, 0.5), cost=Cost(train_seconds=100.0)),  # of an earlier version
    ]
    used = time_use(analyze_curves(records).runs)
    expected = {"optimizer steps": 9.0, "other": 7.0, "generated answers": 2.0, "evaluation": 1.0}
    assert list(used.items()) == [*expected.items(), ("start of trainers", 1.0)]
    assert time_use(analyze_curves(records[2:]).runs) == {}


# -- training losses


def with_losses(found: Record, losses: Sequence[float]) -> Record:
    rate = found.configuration.optimizer.learning_rate
    return replace(found, curve=tuple(StepMetrics(i, loss, rate, 1.0) for i, loss in enumerate(losses, 1)))


def losses_of(records: Sequence[Record], neighbors: bool = True) -> pd.DataFrame:
    found = analyze_curves(records)
    return loss_frame(found.runs, found.best, found.records, neighbors)


def test_a_curve_has_the_losses_of_its_best_rate_and_of_the_next_ones() -> None:
    records = [
        with_losses(record("lora", rate, seed, score), [3.0, 2.0 + seed])
        for rate, score in zip(RATES, (0.1, 0.5, 0.9, 0.4, 0.2), strict=False)
        for seed in range(2)
    ]
    found = losses_of(records)
    rates = found.groupby("role")["learning_rate"].unique()
    expected = {"best": [3e-3], "higher": [1e-2], "lower": [1e-3]}
    assert {role: list(own) for role, own in rates.items()} == expected
    best = found[found["role"] == "best"]
    assert list(best["loss"]) == [3.0, 2.5], "the mean over both seeds"
    assert list(best["step"]) == [1.0, 2.0]
    assert set(losses_of(records, neighbors=False)["role"]) == {"best"}


def test_a_run_that_ended_early_counts_as_far_as_it_got_and_infinite_losses_not_at_all() -> None:
    records = [
        with_losses(record("lora", 1e-3, 0, 0.9), [3.0, 2.0, 1.0]),
        with_losses(record("lora", 1e-3, 1, None), [5.0, math.inf]),
    ]
    assert list(losses_of(records)["loss"]) == [4.0, 2.0, 1.0]
    assert losses_of([record()]).empty


def test_a_long_curve_is_averaged_in_bins() -> None:
    losses = [float(step) for step in range(1, 1001)]
    found = losses_of([with_losses(record("lora", 1e-3, 0, 0.9), losses)])
    assert len(found) == MAX_BINS
    assert found["loss"].iloc[0] == pytest.approx(5.5)
    assert list(found["step"]) == pytest.approx(list(found["loss"]))  # the mean of a bin is its middle
