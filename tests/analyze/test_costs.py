"""The costs of variants and the Pareto front."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from synthetic import DIVERGED, record, study, summarize_curves

from orchestrator.analyze.costs import pareto_front
from orchestrator.analyze.sections.cost_section import time_use_text
from orchestrator.record.schema import Cost, Record


def costly(found: Record, seconds: float, memory: int = 10**9, parameters: int = 1000) -> Record:
    cost = Cost(seconds, 0.5, 100, parameters, memory)
    return replace(found, cost=cost)


def test_a_row_has_the_means_of_finished_runs_and_the_sum_of_all() -> None:
    records = [
        costly(record("lora", 1e-3, 0, 0.9), 4.0, 2 * 10**9),
        costly(record("lora", 1e-3, 1, 0.7), 6.0, 3 * 10**9),
        costly(record("lora", 1e-1, 0, None), 1.0),
        costly(record("dora", 1e-3, 0, 0.5), 8.0),
    ]
    lora, dora = summarize_curves(records).costs
    assert (lora.variant, lora.runs, lora.train_seconds, lora.peak_memory) == ("lora", 2, 5.0, 3 * 10**9)
    assert lora.study_seconds == pytest.approx(4 + 6 + 1 + 3 * 0.5)
    assert lora.score.mean == pytest.approx(0.8)
    assert dora.score.mean == 0.5


def test_a_variant_without_a_finished_run_has_no_row() -> None:
    rows = summarize_curves(study({"lora": ((0.5,),), "hira": (DIVERGED,)})).costs
    assert [row.variant for row in rows] == ["lora"]


def test_the_front_has_the_points_that_no_other_dominates() -> None:
    assert pareto_front([1.0, 2.0, 3.0, 4.0], [0.5, 0.4, 0.7, 0.7]) == [0, 2]
    assert pareto_front([2.0, 2.0], [0.5, 0.9]) == [1]
    generator = random.Random(0)
    for _ in range(200):
        costs = [generator.randint(1, 5) for _ in range(8)]
        scores = [generator.randint(1, 5) for _ in range(8)]
        front = {(costs[i], scores[i]) for i in pareto_front(costs, scores)}
        dominated = {
            (c, s)
            for c, s in zip(costs, scores, strict=True)
            if any(d <= c and t >= s and (d, t) != (c, s) for d, t in zip(costs, scores, strict=True))
        }
        assert front == set(zip(costs, scores, strict=True)) - dominated


def test_the_time_of_the_trainers_is_shown_by_kind() -> None:
    times = {"train_seconds": 6.0, "evaluate_seconds": 3.0, "generate_seconds": 2.0, "start_seconds": 1.0}
    records = [
        replace(record("lora", 1e-3, 0, 0.9), cost=Cost(**times, other_seconds=0.5)),
        replace(record("lora", 1e-3, 1, 0.7), cost=Cost(train_seconds=3.0, other_seconds=6.5)),
        replace(record("dora", 1e-3, 0, 0.5), cost=Cost(train_seconds=100.0)),
    ]
    summary = summarize_curves(records)
    assert summary.time_use is not None
    assert summary.time_use.total == 20.0
    for part in ("optimizer steps 45.0%", "other 35.0%", "generated answers 10.0%", "evaluation 5.0%"):
        assert part in time_use_text(summary)
