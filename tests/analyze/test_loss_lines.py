"""Training curves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from synthetic import RATES, record, summarize_curves

from orchestrator.analyze.loss_lines import MAX_BINS, LossPanel, loss_panels
from orchestrator.record.schema import Record, StepMetrics


def with_losses(found: Record, losses: list[float]) -> Record:
    rate = found.configuration.optimizer.learning_rate
    return replace(found, curve=tuple(StepMetrics(i, loss, rate, 1.0) for i, loss in enumerate(losses, 1)))


def only_panel(records: list[Record]) -> LossPanel:
    (panel,) = loss_panels(summarize_curves(records), records)
    return panel


def test_a_variant_has_its_best_rate_and_the_next_ones() -> None:
    scores = (0.1, 0.5, 0.9, 0.4, 0.2)
    records = [
        with_losses(record("lora", rate, seed, score), [3.0, 2.0 + seed])
        for rate, score in zip(RATES, scores, strict=False)
        for seed in range(2)
    ]
    lines = only_panel(records).variants["lora"]
    assert {line.role: line.rates for line in lines} == {
        "best": (3e-3, 3e-3),
        "lower": (1e-3, 1e-3),
        "higher": (1e-2, 1e-2),
    }
    assert lines[0].losses == (3.0, 2.5)  # the mean over both seeds
    assert lines[0].steps == (1.0, 2.0)
    assert lines[0].runs == 2


def test_a_run_that_ended_early_counts_as_far_as_it_got_and_infinite_losses_not_at_all() -> None:
    records = [
        with_losses(record("lora", 1e-3, 0, 0.9), [3.0, 2.0, 1.0]),
        with_losses(record("lora", 1e-3, 1, None), [5.0, math.inf]),
    ]
    (line,) = only_panel(records).variants["lora"]
    assert line.losses == (4.0, 2.0, 1.0)


def test_a_long_curve_is_averaged_in_bins() -> None:
    losses = [float(step) for step in range(1, 1001)]
    (line,) = only_panel([with_losses(record("lora", 1e-3, 0, 0.9), losses)]).variants["lora"]
    assert len(line.losses) == MAX_BINS
    assert line.losses[0] == pytest.approx(5.5)
    assert line.steps == pytest.approx(line.losses)  # the mean of a bin of this line is its middle
