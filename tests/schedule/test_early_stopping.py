"""The rungs, their settings, and the delegate over Tune's schedulers: with real Tune, without seats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_broker_core import configuration

from orchestrator.schedule.rungs import due, entry, evaluation, first_rung, settings
from orchestrator.study.configuration import Configuration, Schedule


def lane(rate: float = 1e-3, steps: int = 9, warmup: float = 0.05, variant: str = "lora") -> Configuration:
    point = configuration(variant, rate)
    return replace(point, schedule=Schedule(steps, warmup=warmup), evaluations=min(9, steps))


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 10), (0.1, 10), (0.12, 20), (0.5, 50), (1.0, 90)])
def test_the_first_rung_is_the_first_evaluation_after_the_warmup(warmup: float, first: int) -> None:
    point = lane(steps=90, warmup=warmup)
    assert first_rung(point) == first
    counted = [evaluation(point, step) for step in due(point)]
    assert counted == [max(0, 1 + (step - first) // 10) for step in due(point)]


def test_settings_tell_schedulers_and_first_rungs_apart() -> None:
    points = [lane(steps=90), lane(steps=90, warmup=0.5)]
    said = {settings(name, point) for name in ("asha", "median", "hyperband") for point in points}
    assert len(said) == 6
    assert settings("none", points[0]) == ""
    assert settings("asha", points[0]) == "asha loss=min first=10 eta=4 last=30"
    assert settings("asha", points[1]) == "asha loss=min first=50 eta=4 last=50"
    assert settings("asha", lane(1e-2, steps=90)) == settings("asha", points[0]), "the rate is not a setting"


def test_known_results_come_first_but_for_hyperband_where_order_makes_the_brackets() -> None:
    points = [lane(rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    all_new = entry("hyperband", [], points, 4)
    assert entry("none", points[:2], points[2:], 4) == points[2:]
    assert entry("asha", points[:2], points[2:], 4) == points
    assert entry("hyperband", points[:2], points[2:], 4) == all_new


@pytest.mark.parametrize("nodes", [1, 2, 40])
def test_trials_leave_half_of_the_memory_to_seats_under_hyperband_too(nodes: int) -> None:
    from orchestrator.schedule.cluster import Cluster, Node
    from orchestrator.schedule.seat import SeatPlan
    from orchestrator.schedule.train import Room
    from orchestrator.schedule.trial import MEMORY_BYTES

    room = Room(2, SeatPlan(lanes=4, gpus=0, store="", scratch=""))
    for memory in (2 * 2**30, 64 * 2**30):
        cluster = Cluster((Node(8, 0, memory),) * nodes)
        at_once, each = room.trials(cluster, "asha")
        assert at_once is not None
        assert at_once <= 16
        assert at_once * MEMORY_BYTES <= cluster.memory / 2
        at_once, asked = room.trials(cluster, "hyperband")
        assert at_once is None
        assert nodes <= nodes * (memory // asked) <= max(16, nodes), "as many, but one a node at least"
        assert nodes * (memory // asked) * each <= cluster.memory / 2


# -- with Tune. A lane of rate r has the losses r, r, ...; `ends` maps some to the evaluation after which they
# end by themselves, later than all others come there.


@pytest.fixture(scope="module")
def tune_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(scheduler, points, known, ends, at once) -> the last evaluation of each rate."""
    import ray
    from ray import tune

    from orchestrator.schedule.early_stopping import PerGroup

    class Lane(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.point, self.at = Configuration.from_json(config["configuration"]), 0
            self.ends = config["ends"].get(str(self.point.optimizer.learning_rate))

        def step(self) -> dict[str, Any]:
            import time

            if self.at == self.ends:
                time.sleep(4)
                return self.result() | {"done": True}
            self.at += 1
            return self.result() | {"done": self.at == self.point.schedule.steps}

        def result(self) -> dict[str, Any]:
            rate = self.point.optimizer.learning_rate
            return {"step": self.at, "evaluation": self.at, "loss": rate, "rate": rate}

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.setup(config)
            return True

        def save_checkpoint(self, folder: str) -> dict[str, Any]:
            return {"at": self.at}

        def load_checkpoint(self, checkpoint: Any) -> None:
            self.at = checkpoint["at"]

    def run(
        scheduler: str,
        points: list[Configuration],
        known: set[str] = frozenset(),
        ends: dict[str, int] | None = None,
        at_once: int | None = None,
    ) -> dict[tuple[str, float], int]:
        tuner = tune.Tuner(
            tune.with_resources(Lane, tune.PlacementGroupFactory([{"CPU": 1}])),
            param_space={
                "configuration": tune.grid_search([point.to_json() for point in points]),
                "ends": ends or {},
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once, reuse_actors=True, scheduler=PerGroup(scheduler, known)
            ),
            run_config=tune.RunConfig(
                storage_path=str(tmp_path_factory.mktemp("tune")),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        assert not results.errors
        return {
            (Configuration.from_json(r.config["configuration"]).variant.name, r.metrics["rate"]): r.metrics[
                "step"
            ]
            for r in results
        }

    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    yield run
    ray.shutdown()


@pytest.mark.timeout(200)
def test_a_replayed_result_fills_the_rungs_and_is_not_stopped_itself(tune_run: Any) -> None:
    good, bad, worse = lane(1e-3), lane(1e-1), lane(2e-1)
    other = lane(1.0, variant="hira")
    known = {point.fingerprint for point in (good, worse)}
    found = tune_run("asha", [good, worse, bad, other], known, at_once=1)
    # Rungs after 1, 3 and 9; alone, `bad` would be compared with nobody. HiRA is another group.
    assert found == {("lora", 1e-3): 9, ("lora", 2e-1): 9, ("lora", 1e-1): 1, ("hira", 1.0): 9}


@pytest.mark.timeout(200)
def test_the_median_counts_replayed_results(tune_run: Any) -> None:
    points = [lane(rate) for rate in (1e-3, 2e-3, 3e-3, 1e-1)]
    known = {point.fingerprint for point in points[:3]}
    found = tune_run("median", points, known, at_once=1)
    assert [found["lora", rate] for rate in (1e-3, 2e-3, 3e-3, 1e-1)] == [9, 9, 9, 1]


@pytest.mark.timeout(200)
def test_hyperband_goes_on_when_a_lane_ends_by_itself_while_its_bracket_waits(tune_run: Any) -> None:
    """Brackets of 3, 5 and 9 lanes. Of the 9 the best three go on from the first rung to the third
    evaluation; one of them ends before, when the others are paused there."""
    points = [lane(rate) for rate in range(1, 18)]
    found = tune_run("hyperband", points, ends={"9.0": 2})
    assert [found["lora", float(rate)] for rate in range(9, 18)] == [2, 9, 3, 1, 1, 1, 1, 1, 1]
