"""The rungs, their settings, and the scheduler per variant, with real Tune and without trainers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
from points import configuration
from ray.cluster_utils import Cluster

from orchestrator.execution.schedulers import SCHEDULERS, first_rung, scheduler_settings, submission_order
from orchestrator.execution.trial import LaneTrial
from orchestrator.study.configuration import Configuration, LRSchedule

RATES = (1e-3, 1e-2, 1e-1)


def lane(rate: float = 1e-3, steps: int = 9, warmup: float = 0.05, variant: str = "lora") -> Configuration:
    point = configuration(variant, rate)
    return replace(point, lr_schedule=LRSchedule(steps, warmup=warmup), evaluations=min(9, steps))


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 10), (0.1, 10), (0.12, 20), (0.5, 50), (1.0, 90)])
def test_the_first_rung_is_the_first_evaluation_after_the_warmup(warmup: float, first: int) -> None:
    assert first_rung(lane(steps=90, warmup=warmup)) == first


def test_settings_tell_schedulers_and_first_rungs_apart() -> None:
    points = [lane(steps=90), lane(steps=90, warmup=0.5)]
    said = {scheduler_settings(name, point) for name in ("asha", "median") for point in points}
    assert len(said) == 4
    assert scheduler_settings("none", points[0]) == ""
    assert scheduler_settings("asha", points[0]) == "asha loss=min first=10 eta=4 last=30"
    assert scheduler_settings("asha", points[1]) == "asha loss=min first=50 eta=4 last=50"
    assert scheduler_settings("median", points[0]) == "median loss=min first=10 samples=3"
    assert scheduler_settings("asha", lane(1e-2, steps=90)) == scheduler_settings("asha", points[0]), (
        "the rate is not a setting"
    )


def test_known_results_come_first() -> None:
    points = [lane(rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    pending = submission_order("none", points[:2], points[2:], 4)
    assert sorted(pending, key=points.index) == points[2:]
    assert submission_order("asha", points[:2], points[2:], 4) == [*points[:2], *pending]


def test_the_first_lane_groups_are_dealt_out_to_the_trainers() -> None:
    points = [lane(10.0**-power, variant=name) for power in range(9) for name in ("lora", "hira")]
    one, two = (submission_order("none", [], points, 4, trainers) for trainers in (1, 2))
    assert two == [c for pair in zip(one[:4], one[4:8], strict=True) for c in pair] + one[8:]


@pytest.mark.parametrize(("per_seed", "groups"), [(False, 2), (True, 4)])
def test_each_tuning_has_a_scheduler_of_its_own(per_seed: bool, groups: int) -> None:
    from ray.tune.experiment import Trial

    from orchestrator.execution.tune import PerGroupScheduler

    scheduler = PerGroupScheduler("asha", per_seed=per_seed)
    points = [
        replace(lane(rate, variant=v), seed=s) for v in ("lora", "hira") for s in (0, 1) for rate in RATES
    ]
    for point in points:
        trial = Trial("lane", config={"configuration": point}, stub=True)
        scheduler.on_trial_add(None, trial)
    assert len(scheduler.schedulers) == groups
    for (task, variant, seed), own in scheduler.schedulers.items():
        assert task == "letters"
        assert seed in ((0, 1) if per_seed else (0,))
        assert len(own._trial_info) == len(points) / groups, f"all lanes of {variant}'s group, and no others"


@pytest.mark.parametrize("name", [name for name, rule in SCHEDULERS.items() if rule])
def test_a_scheduler_stops_a_high_loss_after_the_warmup_and_pauses_nothing(name: str) -> None:
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    from orchestrator.execution.tune import PerGroupScheduler

    points = [lane(rate, steps=90) for rate in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 1.0)]
    *good, bad = [Trial("lane", config={"configuration": point}, stub=True) for point in points]
    scheduler = PerGroupScheduler(name, {points[0].fingerprint})
    for trial in (*good, bad):
        scheduler.on_trial_add(None, trial)

    def report(trial: Trial, step: int) -> str:
        loss = trial.config["configuration"].optimizer.learning_rate
        return scheduler.on_trial_result(None, trial, {"step": step, "loss": loss, "training_iteration": 1})

    first = first_rung(points[0])
    for step in (first - 1, first):
        decisions = [report(trial, step) for trial in good]
        assert decisions[0] == TrialScheduler.CONTINUE, "its result was known"
        assert TrialScheduler.PAUSE not in decisions
        decision = TrialScheduler.STOP if step == first else TrialScheduler.CONTINUE
        assert report(bad, step) == decision


# -- With Tune. Every loss of a lane is equal to the learning rate of the lane.


@pytest.fixture(scope="module")
def tune_run(connected: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs Tune, and returns the last evaluation of each variant and rate."""
    from ray import tune

    from orchestrator.execution.tune import ConfigurationQueue, PerGroupScheduler

    class Lane(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.point, self.at = config["configuration"], 0

        def step(self) -> dict[str, Any]:
            self.at += 1
            rate = self.point.optimizer.learning_rate
            return {
                "step": self.at,
                "loss": rate,
                "score": -rate,
                "rate": rate,
                "done": self.at == self.point.lr_schedule.steps,
            }

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.setup(config)
            return True

    def run(
        scheduler: str, points: list[Configuration], known: Collection[str] = ()
    ) -> dict[tuple[str, float], int]:
        tuner = tune.Tuner(
            tune.with_resources(Lane, tune.PlacementGroupFactory([{"CPU": 1}])),
            tune_config=tune.TuneConfig(
                search_alg=ConfigurationQueue(lambda *call: None, points, 1),
                num_samples=-1,
                reuse_actors=True,
                scheduler=PerGroupScheduler(scheduler, known),
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
            (r.config["configuration"].variant.name, r.metrics["rate"]): r.metrics["step"] for r in results
        }

    return run


@pytest.mark.ray
def test_a_replayed_result_fills_the_rungs_and_is_not_stopped_itself(tune_run: Any) -> None:
    good, bad, worse = lane(1e-3), lane(1e-1), lane(2e-1)
    other = lane(1.0, variant="hira")
    known = {point.fingerprint for point in (good, worse)}
    found = tune_run("asha", [good, worse, bad, other], known)
    # Rungs lie after 1, 3 and 9 steps. Without the replay, `bad` would be compared with no lane.
    assert found == {("lora", 1e-3): 9, ("lora", 2e-1): 9, ("lora", 1e-1): 1, ("hira", 1.0): 9}


@pytest.mark.ray
def test_the_median_counts_replayed_results(tune_run: Any) -> None:
    points = [lane(rate) for rate in (1e-3, 2e-3, 3e-3, 1e-1)]
    known = {point.fingerprint for point in points[:3]}
    found = tune_run("median", points, known)
    assert [found["lora", rate] for rate in (1e-3, 2e-3, 3e-3, 1e-1)] == [9, 9, 9, 1]


def test_what_tune_gets_from_a_task_graded_at_the_end_is_finite() -> None:
    """Before the last evaluation, the score is the task's floor."""
    trial = object.__new__(LaneTrial)  # the constructor looks for the broker
    trial.configuration = configuration()
    task = trial.configuration.task
    on_the_way = trial._metrics(4, {"loss": 1.5})
    at_the_end = trial._metrics(8, {"loss": 1.0, task.metric: 0.25})
    assert (on_the_way["loss"], on_the_way["score"]) == (1.5, task.floor)
    assert (at_the_end["loss"], at_the_end["score"]) == (1.0, 0.25)
