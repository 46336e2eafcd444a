"""Training of configurations on a cluster: Tune's trials, a pool of trainers, and the broker between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator

from orchestrator.execution.broker.actor import start_broker
from orchestrator.execution.monitor import ABORTED, AbortStopper, BrokerCallback, PendingStops, StudyMonitor
from orchestrator.execution.ray.private import (
    light_trial_actors,
    make_trial,
    retry_after_death_in_reset,
    withhold_cloud_credentials_from_trials,
)
from orchestrator.execution.rungs import submission_order
from orchestrator.execution.settings import Session
from orchestrator.execution.trainers.pool import TrainerPool
from orchestrator.execution.tune.per_group_scheduler import LiveTrialFIFOScheduler, PerGroupScheduler
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES, LaneTrial
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import StudyError

if TYPE_CHECKING:
    from orchestrator.execution.search.budget import SearchBudget

withhold_cloud_credentials_from_trials()

MAX_TRIAL_FAILURES = 20
"""Failures of one trial process that Tune survives. Trials run no code of users, but may lose their node."""
MIN_AUTOSCALED_TRAINERS = 8
"""Number of trainers that the limit for an autoscaled cluster allows for, as on one node with eight GPUs."""


class LaneTrainable(tune.Trainable):
    """The trainable class that the driver registers with Tune. Trial processes run `LaneTrial` instead."""


class ConfigurationListGenerator(BasicVariantGenerator):
    """Generator of one trial per configuration, in the given order, one stage after another.

    This class replaces `grid_search`, for which Ray 2.60 copies the whole grid once per trial. A copy takes
    0.36 s with 5,000 configurations.

    Args:
        configurations: The configurations of the first stage.
        max_concurrent: The largest number of unfinished trials; None for no limit.
        next_stage: Called whenever all trials have ended. Returns the configurations of the next stage; an
            empty sequence ends the experiment.
    """

    def __init__(
        self,
        configurations: Sequence[Configuration],
        max_concurrent: int | None = None,
        next_stage: Callable[[], Sequence[Configuration]] = tuple,
    ) -> None:
        super().__init__(max_concurrent=max_concurrent or 0)
        self._queue, self._next_stage = deque(configurations), next_stage
        self._numbers = count()
        self._spec: dict[str, Any] = {}

    def add_configurations(self, experiments: Any) -> None:
        """Take the experiment from Tune, which gives exactly one."""
        (experiment,) = experiments
        self._spec, self._total_samples = experiment.spec, len(self._queue)

    def next_trial(self) -> Any:
        """Return the next trial; None while the limit is reached, between stages and at the end."""
        if self.is_finished() or 0 < self.max_concurrent <= len(self._live_trials):
            return None
        if not self._queue:
            if self._live_trials:  # the next stage depends on their results
                return None
            self._queue.extend(self._next_stage())
            if not self._queue:
                self.set_finished()
                return None
            self._total_samples += len(self._queue)
        one = {**self._spec, "config": {"configuration": self._queue.popleft()}}
        trial = make_trial(self._uuid_prefix, next(self._numbers), one)
        self._live_trials.add(trial.trial_id)
        return trial

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the generator into its scratch folder

    def save_to_dir(self, dirpath: str, session_str: str = "", **more: Any) -> None:
        """Save nothing, because a study is resumed from its records."""


class SearchLimiter(ConcurrencyLimiter):
    """Limit the unfinished points of a search; `max_concurrent` may change while the search runs."""

    def get_state(self) -> dict[str, Any]:
        """Return nothing, because a search is continued by the command of its study."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its search algorithm into its scratch folder


def train(
    session: Session,
    known: Sequence[Configuration],
    pending: Sequence[Configuration],
    search: SearchBudget | None = None,
    next_stage: Callable[[], Sequence[Configuration]] = tuple,
) -> int:
    """Train configurations, until all have ended or the budget is used up.

    Args:
        session: Settings, storage and observers.
        known: Configurations with results, which are replayed to the scheduler.
        pending: The configurations to train.
        search: The search that suggests the configurations one by one; `known` and `pending` are then unused.
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
    algorithm = _make_algorithm(session, known, pending, search, next_stage)
    broker = start_broker(session.store, session.scheduler)
    pool = TrainerPool(session, broker)
    pending_stops: PendingStops = {}

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
        session.progress.notify(f"{len(results.errors)} trials failed, the first with: {last_line}")
    return sum(monitor.steps_taken.values())


def trial_limit(session: Session, is_search: bool = False, capacities: Sequence[int] = ()) -> int:
    """Return the largest number of concurrent trials.

    It is the number of lanes of all trainers, plus one for each trainer. When a lane ends, the lane of the
    additional trial replaces it at once, while Tune starts the next trial in the free process. A search has
    no additional trials, because a waiting trial was suggested without the results of the lanes in training.

    The lanes of a trainer are those in `capacities`. A trainer that has not reported its limit counts with
    `TrainerSettings.expected_lanes`. In a grid on this machine alone, such a trainer counts with one trial,
    because the processes of more trials would delay its start.

    All trial processes together may use half of the memory that Ray manages, including the memory of nodes
    that an autoscaler may start. The other half is for trainers. An elastic pool on a joined cluster grows
    only if lanes wait, so its limit is computed for more trainers than it has. Their number is the largest of
    twice its trainers, the trainers for which an autoscaler may start nodes, and, with GPUs,
    `MIN_AUTOSCALED_TRAINERS`.

    Args:
        session: The number of trainers and of their lanes, and the nodes with their memory.
        is_search: True if trials are suggested by a search.
        capacities: For each trainer that has reported its limit, the number of lanes that it can hold. In a
            search, it is the number of lanes that may be unfinished for the trainer; see
            `count_usable_lanes` in `broker/assignment.py`.
    """
    num_trainers, settings, cluster = session.num_trainers, session.settings, session.cluster
    if session.is_elastic and not cluster.local:
        least = MIN_AUTOSCALED_TRAINERS if settings.gpus_per_worker else 0
        num_trainers = max(least, 2 * num_trainers, session.autoscaler_capacity)
    expected, most = settings.expected_lanes, settings.max_lanes
    if is_search:
        told = [min(one, most) for one in capacities[:num_trainers]]
    else:
        told = [max(expected, min(one, most)) + 1 for one in capacities[:num_trainers]]
        expected += 1
    if cluster.local and not is_search:
        expected = 1
    wanted = sum(told) + max(0, num_trainers - len(told)) * expected
    memory = max(cluster.memory, session.autoscaler_memory)
    return max(1, min(wanted, int(memory / 2 / TRIAL_MEMORY_BYTES)))


def _make_algorithm(
    session: Session,
    known: Sequence[Configuration],
    pending: Sequence[Configuration],
    search: SearchBudget | None,
    next_stage: Callable[[], Sequence[Configuration]],
) -> Any:
    """Return Tune's search algorithm; the monitor changes its `max_concurrent`."""
    limit, lanes = trial_limit(session, search is not None), session.settings.expected_lanes
    if search is not None:
        from orchestrator.execution.search.searcher import PerGroupSearcher

        searcher = PerGroupSearcher(search, session.store, session.scheduler, lanes, session.cached)
        return SearchLimiter(searcher, limit)
    order = partial(submission_order, session.scheduler, lanes=lanes, num_trainers=session.num_trainers)
    return ConfigurationListGenerator(order(known, pending), limit, lambda: order((), next_stage()))


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
            storage_path=str(session.settings.scratch),
            verbose=0,
            callbacks=[callback],
            stop=AbortStopper(),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _trial_name(trial: Any) -> str:
    return f"{trial.config['configuration'].fingerprint[:12]}-{trial.trial_id}"
