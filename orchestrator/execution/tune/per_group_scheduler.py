"""Tune's schedulers: first in, first out; and early stopping by a scheduler for each group of trials.

Variants do not compete, because each has a group of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from math import inf
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.execution.rungs import MIN_SAMPLES, REDUCTION_FACTOR, first_rung, last_rung
from orchestrator.study.configuration import Configuration


class LiveTrialFIFOScheduler(FIFOScheduler):
    """First-in-first-out scheduler that iterates over unfinished trials only.

    Ray 2.60's own iterates over all trials of the experiment at each step of Tune's loop.
    """

    # With TUNE_RESULT_BUFFER_LENGTH above 1, Tune would call a method that `LaneTrial` does not have. Without
    # this support Tune sets the variable to 1. Each result matters at once: to the scheduler, which decides
    # whether the lane trains on, and to the broker, in which a lane may wait for the next call.
    _supports_buffered_results = False

    def __init__(self) -> None:
        super().__init__()
        self._counter = count()
        self._arrival_order: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put the trial last in the order, even if the trial is tried again."""
        self._arrival_order[trial.trial_id] = next(self._counter)

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
        scheduler: "asha" or "median".
        cached: Fingerprints of known results, which are replayed. A search adds fingerprints. Trials with
            known results fill the rungs and are never stopped.
        per_seed: True if each seed is a separate tuning, so that only trials of the same seed are compared.
    """

    _metric = "loss"

    def __init__(self, scheduler: str, cached: Collection[str] = (), per_seed: bool = False) -> None:
        super().__init__()
        self.per_seed = per_seed
        self.scheduler, self.cached = scheduler, cached
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
            self.schedulers[key] = _make_scheduler(self.scheduler, configuration)
        is_cached = configuration.fingerprint in self.cached
        self.scheduler_of_trial[trial.trial_id] = self.schedulers[key], is_cached
        self.schedulers[key].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the decision of the group's scheduler; a trial with a known result always continues."""
        scheduler, is_cached = self.scheduler_of_trial[trial.trial_id]
        if not is_cached:
            return scheduler.on_trial_result(tune_controller, trial, result)
        # A scheduler adds the result of a completed trial to its rungs without a decision.
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


def _make_scheduler(name: str, configuration: Configuration) -> TrialScheduler:
    """Return Tune's scheduler for one group, which never stops a lane at its last step.

    Args:
        name: "asha" or "median".
        configuration: A configuration of the group, from whose steps and evaluations the rungs follow.
    """
    first = first_rung(configuration)
    options: dict[str, Any] = {"metric": "loss", "mode": "min"}
    if name == "median":
        options["min_time_slice"] = inf  # pausing a trial for others would cost a process and free no lane
        return MedianStoppingRule("step", grace_period=first, min_samples_required=MIN_SAMPLES, **options)
    options |= {"reduction_factor": REDUCTION_FACTOR, "stop_last_trials": False}
    return AsyncHyperBandScheduler("step", grace_period=first, max_t=last_rung(configuration), **options)
