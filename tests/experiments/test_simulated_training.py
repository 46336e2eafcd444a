"""Simulated training, in which the real training loop or a real study follows prepared curves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import replay_schedulers
from scripted import Queue, Script, configuration, get_record, leases, train
from simulated_curves import SimulationPlan, synthetic_curve
from simulated_schedulers import simulate_scheduler
from simulated_training import SimulatedEngine

from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "experiments" / "benchmarks"


def simulate(source: Any, store: Store, plan: SimulationPlan, **options: Any) -> None:
    train(source, store, make_engine=partial(SimulatedEngine, plan), **options)


def replayed_fields(record: Record) -> tuple[Any, ...]:
    """Return the fields of a record that a replay must reproduce."""
    return record.state, record.steps, record.reason, record.curve, record.evaluations, record.baseline_scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Configuration]]:
    """Train three configurations, of which two finish and one diverges. Tests must not change this store."""
    store = Store(tmp_path_factory.mktemp("trained"))
    points = [configuration(seed=s, steps=12, evaluations=6) for s in (0, 1)]
    points.append(configuration(rate=1e36, steps=12, evaluations=6))
    train(Script(leases(points)), store)
    return store, points


def test_a_replay_equals_what_was_trained(trained: tuple[Store, list[Configuration]], tmp_path: Path) -> None:
    before, points = trained
    again = Store(tmp_path / "again")
    simulate(Script(leases(points)), again, SimulationPlan(str(before.root)))
    for point in points:
        assert repr(replayed_fields(get_record(again, point))) == repr(
            replayed_fields(get_record(before, point))
        ), "repr: NaN equals NaN"
        assert get_record(again, point).items == get_record(before, point).items


def test_a_replay_may_evaluate_less_often(trained: tuple[Store, list[Configuration]], tmp_path: Path) -> None:
    before, points = trained
    again, rare = Store(tmp_path / "again"), [replace(point, evaluations=2) for point in points]
    simulate(Script(leases(rare)), again, SimulationPlan(str(before.root), evaluations=6))
    for point, seldom in zip(points, rare, strict=True):
        record, often = get_record(again, seldom), get_record(before, point)
        assert record.steps == often.steps
        assert all(e in often.evaluations for e in record.evaluations)
        steps = [e.step for e in record.evaluations if e.split == "validation"]
        assert steps == ([6, 12] if often.state == "finished" else [])


def test_a_replay_may_evaluate_more_often_with_the_training_loss_as_estimate(
    trained: tuple[Store, list[Configuration]], tmp_path: Path
) -> None:
    before, points = trained
    again, often = Store(tmp_path / "again"), [replace(point, evaluations=12) for point in points]
    simulate(Script(leases(often)), again, SimulationPlan(str(before.root), evaluations=6, loss_window=2))
    for point, closer in zip(points[:2], often, strict=False):
        record, old = get_record(again, closer), get_record(before, point)
        seen = {e.step: e.scores["loss"] for e in record.evaluations if e.split == "validation"}
        known = {e.step: e.scores["loss"] for e in old.evaluations if e.split == "validation"}
        assert seen == {
            step: known.get(step, (old.curve[max(0, step - 2)].loss + old.curve[step - 1].loss) / 2)
            for step in range(1, 13)
        }
        assert record.score("test") == old.score("test")


def test_a_missing_curve_fails_its_lane(tmp_path: Path) -> None:
    Store(tmp_path / "empty")
    store, point = Store(tmp_path / "again"), configuration()
    simulate(Script(leases([point])), store, SimulationPlan(str(tmp_path / "empty")))
    assert get_record(store, point).state == "failed"
    assert "holds no complete curve of" in get_record(store, point).reason


def test_simulated_lanes_follow_the_directives(tmp_path: Path) -> None:
    """Lanes are parked, written to disk, stopped and dropped."""
    store = Store(tmp_path / "store")
    points = [configuration(seed=seed, steps=6, evaluations=3) for seed in range(6)]
    queue = Queue(leases(points))
    simulate(queue, store, SimulationPlan(), lanes=2, spill_seconds=0.0)
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
    simulate(Script(leases(others), answers=answers), store, SimulationPlan())
    stopped, last = get_record(store, others[0]), get_record(store, others[2])
    assert (stopped.state, stopped.steps, stopped.stopped_at) == ("stopped", 2, 2)
    assert store.get(others[1].fingerprint) is None
    assert (last.state, last.steps) == ("finished", 6)


def test_synthetic_curves_have_a_best_rate_and_a_cliff(tmp_path: Path) -> None:
    rates = [10 ** (power / 2) for power in range(-10, 1)]
    points = [configuration(rate=rate, steps=40, evaluations=2) for rate in rates]
    store = Store(tmp_path / "store")
    simulate(Script(leases(points)), store, SimulationPlan(), lanes=16)
    scores = [get_record(store, point).score("validation") for point in points]
    best = max(range(len(rates)), key=lambda index: scores[index] or 0.0)
    assert 0 < best < len(rates) - 1
    assert scores[best] is not None
    assert scores[best] > 0.5
    states = [get_record(store, point).state for point in points]
    assert states[0] == "finished"
    assert states[-1] == "diverged"
    assert all(math.isfinite(score) for score in scores if score is not None)


def test_a_scheduler_is_simulated_without_ray(tmp_path: Path) -> None:
    """With twelve evaluations of 36 steps, ASHA has rungs after 3 and 12 steps."""
    points = [configuration(rate=3.2e-3 * 1.6**away, steps=36, evaluations=12) for away in range(-4, 5)]
    store = Store(tmp_path / "store")
    simulate(Script(leases(points)), store, SimulationPlan(), lanes=16)
    records = {point.fingerprint: get_record(store, point) for point in points}
    found = {
        r.fingerprint: r
        for r in simulate_scheduler("asha", points, records, max_concurrent_trials=len(points))
    }
    assert set(found) == set(records)
    stopped = {f: r.steps for f, r in found.items() if r.state == "stopped"}
    assert set(stopped.values()) <= {3, 12}
    assert 0 < len(stopped) < len(points)
    for fingerprint, step in stopped.items():
        assert [e.step for e in found[fingerprint].evaluations][-1] == step
    best = max(records.values(), key=lambda record: record.score("validation") or 0.0)
    assert found[best.fingerprint] == best
    assert simulate_scheduler("asha", points, records, max_concurrent_trials=len(points)) == list(
        found.values()
    )


def test_a_replay_without_ray_compares_the_chosen_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [configuration(rate=3.2e-3 * 1.6**away, steps=36, evaluations=12) for away in range(-4, 5)]
    store = Store(tmp_path / "store")
    simulate(Script(leases(points)), store, SimulationPlan(), lanes=16)
    arguments = [
        str(store.root),
        "--output",
        str(tmp_path / "replays"),
        "--rates",
        "9",
        "--schedulers",
        "asha",
    ]
    monkeypatch.setattr(sys, "argv", ["replay_schedulers.py", *arguments, "--without-ray"])
    replay_schedulers.run()
    (row,) = json.loads((tmp_path / "replays" / "replays.json").read_text())
    (variant,) = row["variants"].values()
    assert row["configurations"] == len(points)
    assert 0 < row["share"] < 1
    assert variant["share"] == row["share"]
    assert variant["chosen"] == variant["best_rate"]
    assert (variant["grid_distance"], variant["score_loss"]) == (0, 0.0)


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
    assert row["broker_calls_per_second"] > 0
    assert row["driver_mib_peak"] > row["driver_mib_before"] > 0
