"""The rungs, their settings, and the scheduler per variant, with real Tune and without trainers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from points import configuration
from ray.cluster_utils import Cluster

from orchestrator.execution.rungs import (
    evaluation_index,
    first_rung,
    lane_evaluation_steps,
    scheduler_settings,
    submission_order,
)
from orchestrator.study.configuration import Configuration, LRSchedule

RATES = (1e-3, 1e-2, 1e-1)


def lane(rate: float = 1e-3, steps: int = 9, warmup: float = 0.05, variant: str = "lora") -> Configuration:
    point = configuration(variant, rate)
    return replace(point, lr_schedule=LRSchedule(steps, warmup=warmup), evaluations=min(9, steps))


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 10), (0.1, 10), (0.12, 20), (0.5, 50), (1.0, 90)])
def test_the_first_rung_is_the_first_evaluation_after_the_warmup(warmup: float, first: int) -> None:
    point = lane(steps=90, warmup=warmup)
    assert first_rung(point) == first
    counted = [evaluation_index(point, step) for step in lane_evaluation_steps(point)]
    assert counted == [max(0, 1 + (step - first) // 10) for step in lane_evaluation_steps(point)]


def test_settings_tell_schedulers_and_first_rungs_apart() -> None:
    points = [lane(steps=90), lane(steps=90, warmup=0.5)]
    said = {scheduler_settings(name, point) for name in ("asha", "median", "hyperband") for point in points}
    assert len(said) == 6
    assert scheduler_settings("none", points[0]) == ""
    assert scheduler_settings("asha", points[0]) == "asha loss=min first=10 eta=4 last=30"
    assert scheduler_settings("asha", points[1]) == "asha loss=min first=50 eta=4 last=50"
    assert scheduler_settings("median", points[0]) == "median loss=min first=10 samples=3"
    assert scheduler_settings("asha", lane(1e-2, steps=90)) == scheduler_settings("asha", points[0]), (
        "the rate is not a setting"
    )


def test_known_results_come_first_but_for_hyperband_where_order_makes_the_brackets() -> None:
    points = [lane(rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    all_new = submission_order("hyperband", [], points, 4)
    pending = submission_order("none", points[:2], points[2:], 4)
    assert sorted(pending, key=points.index) == points[2:]
    assert submission_order("asha", points[:2], points[2:], 4) == [*points[:2], *pending]
    assert submission_order("hyperband", points[:2], points[2:], 4) == all_new


def test_the_first_lane_groups_are_dealt_out_to_the_trainers() -> None:
    points = [lane(10.0**-power, variant=name) for power in range(9) for name in ("lora", "hira")]
    one, two = (submission_order("none", [], points, 4, trainers) for trainers in (1, 2))
    assert two == [c for pair in zip(one[:4], one[4:8], strict=True) for c in pair] + one[8:]


@pytest.mark.parametrize("nodes", [1, 2, 40])
def test_trials_leave_half_of_the_memory_to_trainers_under_hyperband_too(nodes: int) -> None:
    from orchestrator.execution.ray.runtime import Cluster, Node
    from orchestrator.execution.trainers.pool import PoolConfig
    from orchestrator.execution.trainers.trainer import TrainerSpec
    from orchestrator.execution.tune.concurrency import trial_limits
    from orchestrator.execution.tune.trial import PAUSABLE_TRIAL_MEMORY_BYTES, TRIAL_MEMORY_BYTES

    pool = PoolConfig(2, TrainerSpec(lanes_per_trainer=4, gpus_per_worker=0, store="", scratch=""))
    for memory in (2 * 2**30, 64 * 2**30):
        cluster = Cluster((Node(8, 0, memory),) * nodes)
        at_once, each = trial_limits(pool, cluster, "asha")
        assert at_once is not None
        assert at_once <= 10
        assert each == TRIAL_MEMORY_BYTES
        assert at_once * each <= cluster.memory / 2
        at_once, asked = trial_limits(pool, cluster, "hyperband")
        assert at_once is None
        assert nodes <= nodes * (memory // asked) <= max(10, nodes), "at most ten, but one a node"
        assert nodes * (memory // asked) * PAUSABLE_TRIAL_MEMORY_BYTES <= cluster.memory / 2


@pytest.mark.parametrize(("per_seed", "groups"), [(False, 2), (True, 4)])
def test_each_tuning_has_a_scheduler_of_its_own(per_seed: bool, groups: int) -> None:
    from ray.tune.experiment import Trial

    from orchestrator.execution.tune.per_group_scheduler import PerGroupScheduler

    scheduler = PerGroupScheduler("asha", per_seed=per_seed)
    points = [
        replace(lane(rate, variant=v), seed=s) for v in ("lora", "hira") for s in (0, 1) for rate in RATES
    ]
    for point in points:
        trial = Trial("lane", config={"configuration": point.to_json()}, stub=True)
        scheduler.on_trial_add(None, trial)
    assert len(scheduler.schedulers) == groups
    for (task, variant, seed), own in scheduler.schedulers.items():
        assert task == "letters"
        assert seed in ((0, 1) if per_seed else (0,))
        assert len(own._trial_info) == len(points) / groups, f"all lanes of {variant}'s group, and no others"


# -- With Tune. Every loss of a lane is equal to the learning rate of the lane.


@dataclass(frozen=True)
class EndsEarly:
    """A lane that ends by itself while others wait for it.

    The lane with the learning rate `rate` ends after `after` evaluations, once the lanes with the rates
    `others` are paused at the evaluation `others_at`.
    """

    rate: float
    after: int
    others: frozenset[float]
    others_at: int


def mark_when_paused(ends: EndsEarly, ready: Path) -> Any:
    """Return a Tune callback that writes `ready` once the other trials are paused at the same evaluation."""
    from ray import tune

    class Others(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            paused = [trial.last_result for trial in trials if trial.status == "PAUSED"]
            if ends.others <= {r["rate"] for r in paused if r["evaluation"] == ends.others_at}:
                ready.touch()

    return Others()


@pytest.fixture(scope="module")
def tune_run(connected: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs Tune, and returns the last evaluation of each variant and rate."""
    from ray import tune

    from orchestrator.execution.tune.per_group_scheduler import PerGroupScheduler

    class Lane(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.point, self.at = Configuration.from_json(config["configuration"]), 0
            rate = self.point.optimizer.learning_rate
            self.ends, self.ready = config["ends"].get(str(rate)), Path(config["ready"])

        def step(self) -> dict[str, Any]:
            import time

            if self.at == self.ends:
                while not self.ready.exists():
                    time.sleep(0.05)
                return self.result() | {"done": True}
            self.at += 1
            return self.result() | {"done": self.at == self.point.lr_schedule.steps}

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
        known: Collection[str] = (),
        ends: EndsEarly | None = None,
        at_once: int | None = None,
    ) -> dict[tuple[str, float], int]:
        folder = tmp_path_factory.mktemp("tune")
        ready = folder / "ready"
        tuner = tune.Tuner(
            tune.with_resources(Lane, tune.PlacementGroupFactory([{"CPU": 1}])),
            param_space={
                "configuration": tune.grid_search([point.to_json() for point in points]),
                "ends": {str(ends.rate): ends.after} if ends else {},
                "ready": str(ready),
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                reuse_actors=True,
                scheduler=PerGroupScheduler(scheduler, known),
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                verbose=0,
                callbacks=[mark_when_paused(ends, ready)] if ends else [],
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

    return run


@pytest.mark.ray
def test_a_replayed_result_fills_the_rungs_and_is_not_stopped_itself(tune_run: Any) -> None:
    good, bad, worse = lane(1e-3), lane(1e-1), lane(2e-1)
    other = lane(1.0, variant="hira")
    known = {point.fingerprint for point in (good, worse)}
    found = tune_run("asha", [good, worse, bad, other], known, at_once=1)
    # Rungs lie after 1, 3 and 9 steps. Without the replay, `bad` would be compared with no lane.
    assert found == {("lora", 1e-3): 9, ("lora", 2e-1): 9, ("lora", 1e-1): 1, ("hira", 1.0): 9}


@pytest.mark.ray
def test_the_median_counts_replayed_results(tune_run: Any) -> None:
    points = [lane(rate) for rate in (1e-3, 2e-3, 3e-3, 1e-1)]
    known = {point.fingerprint for point in points[:3]}
    found = tune_run("median", points, known, at_once=1)
    assert [found["lora", rate] for rate in (1e-3, 2e-3, 3e-3, 1e-1)] == [9, 9, 9, 1]


@pytest.mark.ray
def test_hyperband_goes_on_when_a_lane_ends_by_itself_while_its_bracket_waits(tune_run: Any) -> None:
    """There are brackets of 3, 5 and 9 lanes; another variant has brackets of its own.

    Of the 9 lanes, the best three go on from the first rung to the third evaluation. One of the three ends
    before that evaluation, when the other two are paused there.
    """
    points = [lane(float(rate)) for rate in range(1, 18)]
    others = [lane(float(rate), variant="hira") for rate in range(21, 29)]
    ends = EndsEarly(rate=9.0, after=2, others=frozenset({10.0, 11.0}), others_at=3)
    found = tune_run("hyperband", points + others, ends=ends)
    assert [found["lora", float(rate)] for rate in range(9, 18)] == [2, 9, 3, 1, 1, 1, 1, 1, 1]
    assert [found["hira", float(rate)] for rate in range(21, 29)] == [9, 9, 9, 9, 9, 3, 3, 3]
