"""Simulated training, in which the real training loop or a real study follows synthetic curves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Queue, Script, configuration, get_record, leases, train
from simulated_training import SimulatedEngine, synthetic_curve

from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.store import Store

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "experiments" / "benchmarks"


def simulate(source: Any, store: Store, **options: Any) -> None:
    train(source, store, make_engine=SimulatedEngine, **options)


def test_simulated_lanes_follow_the_directives(tmp_path: Path) -> None:
    """Lanes are parked, written to disk, stopped and dropped."""
    store = Store(tmp_path / "store")
    points = [configuration(seed=seed, steps=6, evaluations=3) for seed in range(6)]
    queue = Queue(leases(points))
    simulate(queue, store, lanes=2, spill_seconds=0.0)
    assert queue.spilled
    assert queue.most <= 2
    for point in points:
        record, drawn = get_record(store, point), synthetic_curve(point)
        assert record.state == "finished"
        assert [step.loss for step in record.curve] == drawn.losses
    assert any(get_record(store, point).provenance.resumed_from for point in points)

    def answers(report: Report) -> Directive:
        return {others[0].fingerprint: Directive.STOP, others[1].fingerprint: Directive.DROP}.get(
            report.fingerprint, Directive.CONTINUE
        )

    others = [configuration(seed=seed, steps=6, evaluations=3) for seed in (10, 11, 12)]
    simulate(Script(leases(others), answers=answers), store)
    stopped, last = get_record(store, others[0]), get_record(store, others[2])
    assert (stopped.state, stopped.steps, stopped.stopped_at) == ("stopped", 2, 2)
    assert store.get(others[1].fingerprint) is None
    assert (last.state, last.steps) == ("finished", 6)


def test_synthetic_curves_have_a_best_rate_and_a_cliff(tmp_path: Path) -> None:
    rates = [10 ** (power / 2) for power in range(-10, 1)]
    points = [configuration(rate=rate, steps=40, evaluations=2) for rate in rates]
    store = Store(tmp_path / "store")
    simulate(Script(leases(points)), store, lanes=16)
    scores = [get_record(store, point).score("validation") for point in points]
    best = max(range(len(rates)), key=lambda index: scores[index] or 0.0)
    assert 0 < best < len(rates) - 1
    assert scores[best] is not None
    assert scores[best] > 0.5
    states = [get_record(store, point).state for point in points]
    assert states[0] == "finished"
    assert states[-1] == "diverged"
    assert all(math.isfinite(score) for score in scores if score is not None)


def test_lanes_that_end_while_others_train_are_simulated(tmp_path: Path) -> None:
    store, point = Store(tmp_path / "store"), configuration(steps=6, evaluations=3)
    points = [point, replace(point, lr_schedule=replace(point.lr_schedule, steps=12))]
    simulate(Script(leases(points)), store)
    assert {record.state for record in store.records()} == {"finished"}


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_thirty_configurations_on_a_cluster_of_fake_gpus(tmp_path: Path) -> None:
    """Run scale.py at a small size: three nodes, two trainers on fake GPUs, ASHA."""
    output = tmp_path / "scale"
    script = [sys.executable, str(BENCHMARKS / "scale.py"), "--sizes", "30", "--scheduler", "asha"]
    done = subprocess.run(
        [*script, "--output", str(output)], capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((output / "30-asha.json").read_text())
    records = list(Store(output / "store-30-asha").records())
    assert len(records) == row["records"] == 30
    assert row["states"]["stopped"] > 0
    assert "failed" not in row["states"]
    assert row["steps"] == sum(record.steps for record in records), "the trainers count every step"
    for record in records:
        drawn = synthetic_curve(record.configuration)
        seen = [e for e in record.evaluations if e.split == "validation"]
        assert [step.loss for step in record.curve] == drawn.losses[: len(record.curve)]
        assert [e.scores for e in seen] == [drawn.scores[e.step, e.split] for e in seen]
    assert row["broker_calls_per_second"] > 0 < row["broker_call_seconds"]
    assert row["driver_mib_peak"] > row["driver_mib_before"] > 0
