"""Trials one after another, in the order given. Tune does it itself, at a cost that grows with the square of
their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator, _TrialIterator

from orchestrator.study.configuration import Configuration


class ConfigurationListGenerator(BasicVariantGenerator):
    """What Tune does with `grid_search`, but for its cost: Ray 2.60 copies the whole grid for every trial,
    0.36 s a trial for 5,000 configurations."""

    _trial_generator: Any

    def __init__(self, configurations: Sequence[Configuration], max_concurrent: int | None = None) -> None:
        """`at_once`: how many trials may be alive; None: as many as there is room for."""
        super().__init__(max_concurrent=max_concurrent or 0)
        self.configurations = configurations

    def add_configurations(self, experiments: Any) -> None:
        """`experiments`: Tune's one; its trainable is what every trial runs."""
        (experiment,) = experiments
        self._total_samples = len(self.configurations)
        self._trial_generator = self._generate_trials(experiment.spec)

    def _generate_trials(self, spec: dict[str, Any]) -> Iterator[Any]:
        for number, configuration in enumerate(self.configurations):
            one = {**spec, "config": {"configuration": configuration.to_json()}}
            yield next(_TrialIterator(self._uuid_prefix, 1, one, start=number))

    def save_to_dir(self, dirpath: str, session_str: str = "", **more: Any) -> None:
        """A study is resumed from its records, never from Tune's files."""


class LiveTrialFIFOScheduler(FIFOScheduler):
    """Stops nobody. Ray 2.60's own goes through all trials that ever were at each step of Tune's loop, this
    one through those that have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self._counter = count()
        self._arrival_order: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._arrival_order[trial.trial_id] = next(
            self._counter
        )  # one that is tried again comes after the others

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        for status in (Trial.PENDING, Trial.PAUSED):
            there = [trial for trial in tune_controller.get_live_trials() if trial.status == status]
            if there:
                return min(there, key=lambda trial: self._arrival_order[trial.trial_id])
        return None
