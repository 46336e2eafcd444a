"""Tune's own early stopping, one scheduler a variant and task, so that each variant is tuned as far."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from orchestrator.execution.rungs import (
    MIN_SAMPLES,
    REDUCTION_FACTOR,
    evaluation_index,
    first_rung,
    last_rung,
)
from orchestrator.execution.tune.fifo import LiveTrialFIFOScheduler
from orchestrator.study.configuration import Configuration


class PerVariantScheduler(LiveTrialFIFOScheduler):
    """Passes whatever concerns a trial to the scheduler of its variant and task."""

    _metric = "loss"
    _supports_buffered_results = False  # every result is decided on before the lane goes on

    def __init__(self, scheduler: str, cached: Collection[str] = ()) -> None:
        """`known`: fingerprints of results that are replayed. They fill the rungs that the others are
        measured by, and nothing is decided about them; a search adds to them. (Under Hyperband they are
        members of brackets.)"""
        super().__init__()
        self.scheduler, self.cached = scheduler, () if scheduler == "hyperband" else cached
        self.schedulers: dict[tuple[str, str], Any] = {}
        self.scheduler_of_trial: dict[
            str, tuple[Any, bool]
        ] = {}  # trial -> its scheduler, whether it is known

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        configuration = Configuration.from_json(trial.config["configuration"])
        variant_key = (configuration.task.name, configuration.variant.name)
        if variant_key not in self.schedulers:
            self.schedulers[variant_key] = _make_scheduler(self.scheduler, configuration)
        self.scheduler_of_trial[trial.trial_id] = (
            self.schedulers[variant_key],
            configuration.fingerprint in self.cached,
        )
        self.schedulers[variant_key].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        scheduler, is_cached = self.scheduler_of_trial[trial.trial_id]
        if not is_cached:
            return scheduler.on_trial_result(tune_controller, trial, result)
        # As if it were complete at each of its results: these are noted and not decided on.
        scheduler.on_trial_complete(tune_controller, trial, result)
        scheduler.on_trial_add(tune_controller, trial)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.scheduler_of_trial[trial.trial_id][0].on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler_of_trial[trial.trial_id][0].on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler_of_trial[trial.trial_id][0].on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Only Hyperband has a choice of its own, for its paused trials: the first that any of them wants to
        run. The others take trials as they come."""
        if self.scheduler != "hyperband":
            return super().choose_trial_to_run(tune_controller)
        chosen = (scheduler.choose_trial_to_run(tune_controller) for scheduler in self.schedulers.values())
        return next((trial for trial in chosen if trial is not None), None)

    def debug_string(self) -> str:
        return "\n".join(f"{group}: {each.debug_string()}" for group, each in self.schedulers.items())


class _HyperBand(HyperBandScheduler):
    """Ray 2.60 marks a bracket as being processed and never takes the mark off. A trial that ends by itself
    (a lane that diverged) once its bracket was halved then no longer lets the paused ones of it go on."""

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        try:
            return super()._process_bracket(tune_controller, bracket)
        finally:
            bracket.is_being_processed = False


def _make_scheduler(name: str, configuration: Configuration) -> TrialScheduler:
    """Lanes that come to their end end by themselves: no scheduler stops the last."""
    steps, first = configuration.schedule.steps, first_rung(configuration)
    loss: dict[str, Any] = {"metric": "loss", "mode": "min"}
    if name == "asha":
        last = last_rung(configuration)
        return AsyncHyperBandScheduler(
            "step",
            **loss,
            max_t=last,
            grace_period=first,
            reduction_factor=REDUCTION_FACTOR[name],
            stop_last_trials=False,
        )
    if name == "median":
        never: Any = inf  # a trial that yields to others would cost a process and free no lane
        return MedianStoppingRule(
            "step", **loss, grace_period=first, min_samples_required=MIN_SAMPLES, min_time_slice=never
        )
    units = evaluation_index(configuration, steps)
    return _HyperBand(
        "evaluation", **loss, max_t=units, reduction_factor=REDUCTION_FACTOR[name], stop_last_trials=False
    )
