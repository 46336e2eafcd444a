"""The part of a study that Ray Tune runs: trials, scheduler, and what tells the broker how trials end.

A trial is one configuration and holds no model: it waits for the reports of its lane (`trial.py`). Variants
do not compete, because each has a scheduler of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.execution.schedulers import SCHEDULERS
from orchestrator.execution.trial import TRIAL_MEMORY_BYTES, LaneTrial
from orchestrator.study.configuration import Configuration

MAX_TRIAL_FAILURES = 20
"""Failures of one trial process that Tune survives. Trials run no code of users, but may lose their node."""
ABORTED = threading.Event()
"""Set when the study cannot continue. It is a global, because Tune pickles its stoppers."""


class LaneTrainable(tune.Trainable):
    """Tune's trainable around `LaneTrial`, which replaces it where Ray allows that."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take over a trial."""
        self.lane_trial = LaneTrial({**config, "__trial_info__": self.trial_id})

    def step(self) -> dict[str, Any]:
        """Wait for the lane's next report, or its end, and return Tune's result."""
        return self.lane_trial.step()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial, so that Tune can reuse the process."""
        self.setup(new_config)
        return True


class ConfigurationQueue(Searcher):
    """Tune's searcher for a list of configurations, one stage after another.

    It also tells the broker how trials end, since a killed trial cannot do so itself.

    Args:
        call_broker: Calls a method of the broker, and waits for its answer.
        configurations: The configurations of the first stage.
        max_concurrent: The largest number of unfinished trials; it may change at any time.
        next_stage: Called whenever all trials have ended. Returns the configurations of the next stage; an
            empty sequence ends the experiment.
    """

    def __init__(
        self,
        call_broker: Callable[..., object],
        configurations: Sequence[Configuration],
        max_concurrent: int,
        next_stage: Callable[[], Sequence[Configuration]] = tuple,
    ) -> None:
        super().__init__(metric="score", mode="max")
        self.call_broker, self.max_concurrent, self.next_stage = call_broker, max_concurrent, next_stage
        self.queue = deque(configurations)
        self.unfinished: dict[str, Configuration] = {}

    def suggest(self, trial_id: str) -> Any:  # Tune's own type leaves out FINISHED
        """Return the next configuration; None while the limit is reached, and between stages."""
        if ABORTED.is_set():
            return Searcher.FINISHED
        if len(self.unfinished) >= self.max_concurrent:
            return None
        if not self.queue:
            if self.unfinished:  # the next stage depends on their results
                return None
            self.queue.extend(self.next_stage())
            if not self.queue:
                return Searcher.FINISHED
        self.unfinished[trial_id] = configuration = self.queue.popleft()
        return {"configuration": configuration}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Release the trial, or stop its lane if the scheduler has stopped the trial.

        When `fit` returns, the broker knows of every end. A trial that failed MAX_TRIAL_FAILURES times is
        left to the next run of the study.
        """
        configuration = self.unfinished.pop(trial_id)
        if (result or {}).get("state") == "training":
            self.call_broker("stop", trial_id, configuration, result["step"])
        else:
            self.call_broker("release", trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, because a study is resumed from its records."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher into its scratch folder


class LiveTrialFIFOScheduler(FIFOScheduler):
    """First-in-first-out scheduler that iterates over unfinished trials only.

    Tune's own iterates over all trials of the experiment at each step of its loop.

    Args:
        on_add: Called with each trial that Tune adds.
    """

    def __init__(self, on_add: Callable[[Any], object] = id) -> None:
        super().__init__()
        self._on_add, self._counter = on_add, count()
        self._arrival_order: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put the trial last in the order, even if the trial is tried again."""
        self._arrival_order[trial.trial_id] = next(self._counter)
        self._on_add(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the first pending trial, else the first paused one, else None."""
        for status in (Trial.PENDING, Trial.PAUSED):
            there = [trial for trial in tune_controller.get_live_trials() if trial.status == status]
            if there:
                return min(there, key=lambda trial: self._arrival_order[trial.trial_id])
        return None


class PerGroupScheduler(LiveTrialFIFOScheduler):
    """Scheduler that passes each call to the scheduler of the trial's group.

    A group has the trials of one variant and task; with `per_seed`, of one variant, task and seed.

    Args:
        scheduler: A name in `SCHEDULERS`.
        cached: Fingerprints of known results, which are replayed. A search adds fingerprints. Trials with
            known results fill the rungs and are never stopped.
        per_seed: True if each seed is a separate tuning, so that only trials of the same seed are compared.
        on_add: Called with each trial that Tune adds.
    """

    def __init__(
        self,
        scheduler: str,
        cached: Collection[str] = (),
        per_seed: bool = False,
        on_add: Callable[[Any], object] = id,
    ) -> None:
        super().__init__(on_add)
        rule = SCHEDULERS[scheduler]
        assert rule is not None
        self.rule, self.cached, self.per_seed = rule, cached, per_seed
        self.schedulers: dict[tuple[str, str, int], Any] = {}
        self.scheduler_of_trial: dict[str, tuple[Any, bool]] = {}
        """Trial id -> the scheduler of its group, and whether its result is known."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add the trial to the scheduler of its group, which is created for the first trial of the group."""
        super().on_trial_add(tune_controller, trial)
        configuration: Configuration = trial.config["configuration"]
        seed = configuration.seed if self.per_seed else 0
        key = configuration.task.name, configuration.variant.name, seed
        if key not in self.schedulers:
            self.schedulers[key] = self.rule.make(configuration)
        is_cached = configuration.fingerprint in self.cached
        self.scheduler_of_trial[trial.trial_id] = self.schedulers[key], is_cached
        self.schedulers[key].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the decision of the group's scheduler; a trial with a known result always continues."""
        scheduler, is_cached = self.scheduler_of_trial[trial.trial_id]
        if not is_cached:
            return scheduler.on_trial_result(tune_controller, trial, result)
        # A completed trial enters the rungs without a decision. It then joins again for its next result.
        scheduler.on_trial_complete(tune_controller, trial, result)
        scheduler.on_trial_add(tune_controller, trial)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Pass the call on."""
        self.scheduler_of_trial[trial.trial_id][0].on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass the call on."""
        self.scheduler_of_trial[trial.trial_id][0].on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Pass the call on."""
        self.scheduler_of_trial[trial.trial_id][0].on_trial_remove(tune_controller, trial)


class AbortStopper(tune.Stopper):
    """Stopper that ends Tune's loop once ABORTED is set."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether the study was aborted."""
        return ABORTED.is_set()


def make_tuner(searcher: Searcher, scheduler: FIFOScheduler, name: str, folder: Path) -> tune.Tuner:
    """Return the Tuner of a study.

    Args:
        searcher: Suggests the configurations and ends the experiment.
        scheduler: Decides which trials are stopped early.
        name: The name of Tune's experiment.
        folder: Folder for Tune's files, of which nothing is read again.
    """
    # Otherwise Tune starts one trial after the other.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "64")
    return tune.Tuner(
        tune.with_resources(LaneTrainable, tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES}])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            scheduler=scheduler,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=0,
            stop=AbortStopper(),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _trial_name(trial: Any) -> str:
    return f"{trial.config['configuration'].fingerprint[:12]}-{trial.trial_id}"
