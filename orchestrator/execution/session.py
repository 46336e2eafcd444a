"""Training of configurations on a cluster: Tune's trials, a pool of trainers, and the broker between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune

from orchestrator.execution.broker.actor import start_broker
from orchestrator.execution.monitor import StudyMonitor
from orchestrator.execution.ray.private import (
    light_trial_actors,
    retry_after_death_in_reset,
    withhold_cloud_credentials_from_trials,
)
from orchestrator.execution.settings import Session
from orchestrator.execution.trainers.pool import TrainerPool
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.tune.concurrency import SearchLimiter, trial_limit
from orchestrator.execution.tune.fifo import ConfigurationListGenerator, LiveTrialFIFOScheduler
from orchestrator.execution.tune.per_group_scheduler import PerGroupScheduler
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES, LaneTrial
from orchestrator.execution.tune.trial_events import ABORTED, AbortStopper, BrokerCallback, PendingStops
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import StudyError

if TYPE_CHECKING:
    from orchestrator.execution.search.searcher import PerGroupSearcher

withhold_cloud_credentials_from_trials()

MAX_TRIAL_FAILURES = 20
"""Failures of one trial process that Tune survives. Trials run no code of users, but may lose their node."""


class LaneTrainable(tune.Trainable):
    """The trainable class that the driver registers with Tune. Trial processes run `LaneTrial` instead."""


def train(
    session: Session,
    configurations: Sequence[Configuration],
    search: PerGroupSearcher | None = None,
    next_stage: Callable[[], Sequence[Configuration]] = tuple,
) -> int:
    """Train configurations in the given order, until all have ended or the budget is used up.

    Args:
        session: Settings, storage and observers.
        configurations: The configurations to train; known results among them are replayed to the scheduler.
        search: The searcher that suggests the configurations one by one; `configurations` is then unused.
        next_stage: Called when all configurations have ended. Returns the configurations of the next stage;
            an empty sequence ends the session.

    Returns:
        The number of optimizer steps that the trainers have taken.

    Raises:
        StudyError: No trainer could be started, trainers failed too often, or the broker was lost. The
            trainers and the broker have ended by then.
        Exception: Any error of the monitor, such as OSError for a full disk.
    """
    ABORTED.clear()
    progress = session.progress
    broker = start_broker(session.store, session.scheduler)
    visibility = StorageVisibility(session.trainers.scratch, session.cluster.nodes, progress.notify)
    pool = TrainerPool(session, broker, visibility)
    pending_stops: PendingStops = {}
    algorithm = _make_algorithm(session, configurations, search, next_stage)

    def follow_trainers(updates: Mapping[str, Any]) -> None:
        capacities = updates["max_lanes" if search is None else "usable_lanes"]
        algorithm.max_concurrent = trial_limit(session, search is not None, capacities)

    monitor = StudyMonitor(session, broker, pool, pending_stops, follow_trainers)
    monitor.start()
    try:
        callback = BrokerCallback(broker, pending_stops)
        with light_trial_actors(LaneTrainable, LaneTrial), retry_after_death_in_reset():
            results = _make_tuner(session, algorithm, callback).fit()
        monitor.wait_for_pending_stops()
    finally:
        monitor.close()
    if monitor.error is not None:
        raise monitor.error
    if pool.failure_reason:
        raise StudyError(pool.failure_reason)
    if results.errors:
        last_line = str(results.errors[0]).strip().splitlines()[-1]
        progress.notify(f"{len(results.errors)} trials failed, the first with: {last_line}")
    return sum(monitor.steps_taken.values())


def _make_algorithm(
    session: Session,
    configurations: Sequence[Configuration],
    search: PerGroupSearcher | None,
    next_stage: Callable[[], Sequence[Configuration]],
) -> Any:
    """Return Tune's search algorithm; the monitor changes its `max_concurrent`."""
    limit = trial_limit(session, search is not None)
    if search is None:
        return ConfigurationListGenerator(configurations, limit, next_stage)
    return SearchLimiter(search, limit)


def _make_tuner(session: Session, algorithm: Any, callback: BrokerCallback) -> tune.Tuner:
    is_search = not isinstance(algorithm, ConfigurationListGenerator)
    return tune.Tuner(
        tune.with_resources(LaneTrainable, tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES}])),
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            num_samples=-1 if is_search else 1,  # the searcher ends the experiment
            scheduler=LiveTrialFIFOScheduler()
            if session.scheduler == "none"
            else PerGroupScheduler(session.scheduler, session.cached, session.tune_per_seed),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=session.cluster.namespace,
            storage_path=str(session.trainers.scratch),
            verbose=0,
            callbacks=[callback],
            stop=AbortStopper(),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _trial_name(trial: Any) -> str:
    return f"{Configuration.from_json(trial.config['configuration']).fingerprint[:12]}-{trial.trial_id}"
