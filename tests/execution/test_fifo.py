"""The grid's trials, with Tune's own trial objects and without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from points import POINTS
from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import FIFOScheduler

from orchestrator.execution.tune.fifo import ConfigurationListGenerator, LiveTrialFIFOScheduler
from orchestrator.study.configuration import Configuration


class Nothing(tune.Trainable):
    pass


def trials(search: ConfigurationListGenerator, folder: Path) -> list[Any]:
    """Return all trials that the generator gives now."""
    if not search.total_samples:
        search.add_configurations([Experiment("test", Nothing, storage_path=str(folder))])
    return list(iter(search.next_trial, None))


def test_every_configuration_is_one_trial_in_the_order_given(tmp_path: Path) -> None:
    points = [replace(point, seed=seed) for seed in range(40) for point in POINTS]
    search = ConfigurationListGenerator(points)
    made = trials(search, tmp_path)
    assert [Configuration.from_json(trial.config["configuration"]) for trial in made] == points
    assert len({trial.trial_id for trial in made}) == len(points) == search.total_samples
    for trial in made:
        assert not search.is_finished()
        search.on_trial_complete(trial.trial_id)
    assert trials(search, tmp_path) == []
    assert search.is_finished()


def test_the_next_stage_is_asked_for_when_all_trials_have_ended(tmp_path: Path) -> None:
    stages = [POINTS[1:3], []]
    search = ConfigurationListGenerator(POINTS[:1], next_stage=lambda: stages.pop(0))
    (first,) = trials(search, tmp_path)
    assert trials(search, tmp_path) == []
    assert len(stages) == 2, "the next stage was requested before the trial ended"
    search.on_trial_complete(first.trial_id, error=True)
    second = trials(search, tmp_path)
    assert [Configuration.from_json(trial.config["configuration"]) for trial in second] == POINTS[1:3]
    assert len({trial.trial_id for trial in (first, *second)}) == 3 == search.total_samples
    for trial in second:
        search.on_trial_complete(trial.trial_id)
    assert trials(search, tmp_path) == []
    assert search.is_finished()


def test_the_number_of_unfinished_trials_is_limited(tmp_path: Path) -> None:
    search = ConfigurationListGenerator(POINTS, max_concurrent=2)
    first = trials(search, tmp_path)
    assert len(first) == 2
    assert trials(search, tmp_path) == []
    search.on_trial_complete(first[1].trial_id)
    (third,) = trials(search, tmp_path)
    assert Configuration.from_json(third.config["configuration"]) == POINTS[2]


class Controller:
    """The part of Tune's controller that a FIFO scheduler uses: all trials in order of arrival, and the set
    of unfinished trials."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self.trials if not trial.is_finished()}


STATUSES = st.sampled_from([Trial.PENDING, Trial.PAUSED, Trial.RUNNING, Trial.TERMINATED, Trial.ERROR])


@given(st.lists(STATUSES, max_size=12), st.data())
def test_the_next_trial_is_the_one_that_tunes_own_scheduler_takes(statuses: list[str], data: Any) -> None:
    came = [Trial("Nothing", stub=True, trial_id=f"{number:x}") for number in range(len(statuses))]
    scheduler, controller = LiveTrialFIFOScheduler(), Controller(came)
    for trial in came:
        scheduler.on_trial_add(controller, trial)
    for trial, status in zip(came, statuses, strict=True):
        trial.set_status(status)
    if came:  # a trial that is tried again: Tune moves it to the end of its list, and adds it again
        again = data.draw(st.sampled_from(came))
        came.remove(again)
        came.append(again)
        scheduler.on_trial_add(controller, again)
    assert scheduler.choose_trial_to_run(controller) is FIFOScheduler().choose_trial_to_run(controller)
