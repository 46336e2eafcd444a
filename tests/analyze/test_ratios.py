"""Best learning rates and their ratios on curves whose true optima are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from synthetic import analyze_curves, record
from tuned_records import Truth, compare, tuned_records

from orchestrator.analyze import sections
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Record

OPTIMA = {"lora": -2.1, "full": -3.1, "pissa": -2.85, "hira": -1.9}
"""Variant -> log10 of its best rate."""
RATIOS = {"lora": ("full", 1.0), "pissa": ("lora", -0.75), "hira": ("lora", 0.2), "full": ("", math.nan)}
"""Variant -> the variant in the denominator, and log10 of the true ratio."""
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def bells(low: float = 0.0, optima: Mapping[str, float] = OPTIMA, steps: int = 60) -> list[Record]:
    """Return the records of a grid with three seeds: each curve is a bell of 0.8 decades above `low`."""
    draw = np.random.default_rng(3)
    found = []
    for variant, optimum in optima.items():
        for rate in GRID:
            for seed in range(3):
                score = 0.9 * math.exp(-(((math.log10(rate) - optimum) / 0.8) ** 2)) + draw.normal(0, 0.01)
                found.append(record(variant, rate, seed, max(low, score), steps=steps))
    return found


def rows_of(results: Results) -> dict[str, dict[str, Any]]:
    return {row["curve"]: row for row in results.ratios.to_dict("records")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: analyze_curves(bells()),
        lambda: compare(tuned_records({v: Truth(optimum=x) for v, x in OPTIMA.items()}, noise=0.002)),
    ],
    ids=["grid", "replicates"],
)
def test_the_true_best_rates_and_ratios_lie_in_their_intervals(make: Any) -> None:
    rows = rows_of(make())
    assert rows.keys() == OPTIMA.keys()
    for variant, (baseline, ratio) in RATIOS.items():
        row = rows[variant]
        assert row["baseline"] == baseline
        assert row["rate_low"] < 10 ** OPTIMA[variant] < row["rate_high"]
        if baseline:
            assert row["ratio_low"] < 10**ratio < row["ratio_high"] < 4 * row["ratio_low"]
    assert rows["pissa"]["published"] == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "published"), [(60, 15.0), (1500, 10.0)])
def test_short_runs_have_another_published_ratio_over_full_fine_tuning(steps: int, published: float) -> None:
    rows = rows_of(analyze_curves(bells(steps=steps, optima={"lora": -2.0, "full": -3.0})))
    assert rows["lora"]["published"] == published


@pytest.mark.parametrize(
    ("optima", "low", "high"),
    [
        ({"lora": -2.0, "hira": 0.0}, 10.0, math.nan),
        ({"lora": -2.0, "hira": -6.0}, math.nan, 0.001),
        ({"lora": 0.0, "hira": -2.0}, math.nan, 0.1),
        ({"lora": 0.0, "hira": 0.0}, math.nan, math.nan),
    ],
)
def test_an_optimum_at_an_edge_gives_a_bound_and_no_ratio(
    optima: dict[str, float], low: float, high: float
) -> None:
    results = analyze_curves(bells(optima=optima))
    row = rows_of(results)["hira"]
    assert math.isnan(row["ratio"])
    assert (row["ratio_low"], row["ratio_high"]) == pytest.approx((low, high), rel=0.2, nan_ok=True)
    (table,) = (s.table for s in sections.make_sections(sections.Report(results)) if s.name == "ratios")
    assert table is not None
    assert table.rows[0][2][0] == ("-" if math.isnan(low) and math.isnan(high) else "≤≥"[low > 0])


def test_a_curve_without_an_optimum_has_no_ratio() -> None:
    nothing = [record("hira", rate, seed, 0.0) for rate in GRID for seed in range(3)]
    results = analyze_curves([*bells(optima={"lora": -2.0}), *nothing])
    assert rows_of(results).keys() == {"lora"}
    assert not any(s.name == "ratios" for s in sections.make_sections(sections.Report(results)))


def test_one_seed_gives_a_ratio_without_an_interval() -> None:
    row = rows_of(analyze_curves(r for r in bells() if r.configuration.seed == 0))["pissa"]
    assert row["ratio"] == pytest.approx(10**-0.75, rel=0.3)
    assert math.isnan(row["ratio_low"])
