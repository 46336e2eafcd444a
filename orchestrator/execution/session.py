"""Trains configurations on a cluster: Tune's trials on one side, trainers on the other, a broker between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.tune.execution import class_cache

from orchestrator.execution.broker.actor import start_broker
from orchestrator.execution.broker.core import parse_trainer_name
from orchestrator.execution.broker.lane_entry import LeasePhase
from orchestrator.execution.progress import Progress
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.run_budget import RunBudget
from orchestrator.execution.search.searcher import PerVariantSearcher
from orchestrator.execution.trainers.exit_status import format_ray_error
from orchestrator.execution.trainers.pool import TrainerPool
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.execution.tune.early_stopping import PerVariantScheduler
from orchestrator.execution.tune.fifo import ConfigurationListGenerator, LiveTrialFIFOScheduler
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES, LaneTrainable
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.command import interrupt_main_thread
from orchestrator.util.errors import StudyError
from orchestrator.util.watched_clock import SuspendTolerantClock

# Tune hands these to its trials in a runtime environment, which Ray writes into a log and into the command
# lines of the processes that it starts. Trials talk to the broker alone.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)

MIN_AUTOSCALED_TRAINERS = 8  # a GPU node's
MAX_TRIAL_FAILURES = 20


@dataclass(frozen=True)
class PoolConfig:
    """How many trainers, and the lanes of each. `follow`: `trainers` are those of now, and as nodes come and go
    there may be more or fewer; with an autoscaler `to_come`, of which it is known."""

    num_trainers: int
    spec: TrainerSpec
    elastic: bool = False
    autoscaler_capacity: int = 0

    def trial_limits(self, cluster: Cluster, scheduler: str) -> tuple[int | None, int]:
        """Trials at once, and the bytes that each asks Ray for. As many as the lanes of all trainers and a lane group
        each to take next, as far as memory for their processes goes: half of what Ray may promise, the rest
        is the trainers'. Hyperband pauses a trial until all of its bracket have come as far, and Tune counts
        paused ones: there the same limit is kept by what each asks for, on whichever node. Tune's limit
        holds to the end: a cluster of GPUs that may grow gets one for twice its trainers."""
        growing = self.elastic and not cluster.local and self.spec.gpus_per_worker
        num_trainers = (
            max(MIN_AUTOSCALED_TRAINERS, 2 * self.num_trainers, self.autoscaler_capacity)
            if growing
            else self.num_trainers
        )
        wanted = 2 * num_trainers * self.spec.lanes_per_trainer
        if scheduler == "hyperband":
            share = max(cluster.memory / wanted, 2 * TRIAL_MEMORY_BYTES)
            return None, int(min(share, max(node.memory for node in cluster.nodes)))
        return max(1, min(wanted, int(cluster.memory / 2 / TRIAL_MEMORY_BYTES))), TRIAL_MEMORY_BYTES


def train(
    configurations: Sequence[Configuration],
    cached: Collection[str],
    scheduler: str,
    cluster: Cluster,
    pool_config: PoolConfig,
    store: Store,
    scratch: Path,
    progress: Progress,
    on_record: Callable[[Record], None],
    budget: RunBudget,
    search: PerVariantSearcher | None = None,
) -> int:
    """Trains all of `configurations`, in this order, but for the `known` ones (fingerprints), whose results
    are replayed to the scheduler; `ended` is called with each new record, from another thread. When one of
    `limits` is reached the trainers save their lanes, and the rest is left. Returns the optimizer steps that
    trainers have taken. With a `search` it is that which names the configurations, and adds to `known`.

    Raises Trouble when no trainer can be had. Whatever happens, trainers and broker are gone afterwards.
    """
    _ABORTED.clear()
    broker = start_broker(store, scheduler)
    visibility = StorageVisibility(scratch, cluster.nodes, progress.notify)
    pool = TrainerPool(
        pool_config.spec,
        pool_config.num_trainers,
        cluster.namespace,
        broker,
        visibility,
        progress.notify,
        pool_config.elastic,
        pool_config.autoscaler_capacity,
    )
    pending_stops: PendingStops = {}
    monitor = _StudyMonitor(
        broker, pool, store, progress, cached, scheduler, pending_stops, on_record, budget
    )
    monitor.start()
    max_concurrent, memory = pool_config.trial_limits(cluster, scheduler)
    if search and max_concurrent:
        max_concurrent = max(1, max_concurrent // 2)  # what waits beside the lanes was suggested knowing less
    try:
        tuner = tune.Tuner(
            tune.with_resources(LaneTrainable, tune.PlacementGroupFactory([{"memory": memory}])),
            tune_config=tune.TuneConfig(
                search_alg=search or ConfigurationListGenerator(configurations, max_concurrent),
                num_samples=-1 if search else 1,  # the search says when it is done
                max_concurrent_trials=max_concurrent if search else None,
                scheduler=LiveTrialFIFOScheduler()
                if scheduler == "none"
                else PerVariantScheduler(scheduler, cached),
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=cluster.namespace,
                storage_path=str(scratch),
                verbose=0,
                callbacks=[_BrokerCallback(broker, pending_stops)],
                stop=_AbortStopper(),
                # Of trial processes, which run no user's code and may lose a node now and then; lanes are the
                # broker's.
                failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        monitor.wait_for_pending_stops()
    finally:
        monitor.close()
    if monitor.error is not None:
        raise monitor.error
    if monitor.pool.failure_reason:
        raise StudyError(monitor.pool.failure_reason)
    for error in results.errors[:1]:
        progress.notify(
            f"{len(results.errors)} trials failed, the first with: {str(error).strip().splitlines()[-1]}"
        )
    return sum(monitor.steps_taken.values())


def _trial_name(trial: Any) -> str:
    return f"{Configuration.from_json(trial.config['configuration']).fingerprint[:12]}-{trial.trial_id}"


_ABORTED = threading.Event()  # not a part of the stopper, which Tune pickles


class _AbortStopper(tune.Stopper):
    """Ends Tune's loop when the watch has given up; the broker lets the waiting trials go."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _ABORTED.is_set()


PendingStops = dict[str, tuple[Configuration, int]]
"""Trials that the scheduler has stopped, while the store has no record of it: what, and after which step. The
broker forgets it when it restarts."""


class _BrokerCallback(tune.Callback):
    """Which trials have ended, and how: from here, since a killed trial or a paused one cannot say it."""

    def __init__(self, broker: Any, pending_stops: PendingStops) -> None:
        self.broker, self.pending_stops = broker, pending_stops

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One that ends by itself says in which state its lane did; others were stopped by the scheduler."""
        if trial.last_result.get("state") == "training":
            stopped = Configuration.from_json(trial.config["configuration"]), trial.last_result["step"]
            self.pending_stops[trial.trial_id] = stopped
            self._call_broker(self.broker.stop, trial.trial_id, *stopped)
        else:
            self._call_broker(self.broker.release, trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._call_broker(self.broker.release, trial.trial_id)

    def _call_broker(self, method: Any, *args: Any) -> None:
        """Waits until the broker knows: what is owed when all trials have ended is counted there."""
        while not _ABORTED.is_set():
            try:
                ray.get(method.remote(*args))
                return
            except ActorUnavailableError:  # it restarts
                time.sleep(0.5)
            except ActorDiedError:  # for good; the watch ends the study
                return


class _StudyMonitor(threading.Thread):
    """Beside `Tuner.fit`, which blocks: keeps the trainers, reads the records of ended lanes, shows progress."""

    def __init__(
        self,
        broker: Any,
        pool: TrainerPool,
        store: Store,
        progress: Progress,
        cached: Collection[str],
        scheduler: str,
        pending_stops: PendingStops,
        on_record: Callable[[Record], None],
        budget: RunBudget,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.broker, self.pool, self.store, self.progress = broker, pool, store, progress
        self.cached, self.scheduler, self.pending_stops, self.on_record = (
            cached,
            scheduler,
            pending_stops,
            on_record,
        )
        self.budget = budget
        self.draining_since: float | None = (
            None  # since when trainers save their lanes, for the end of the study
        )
        self.is_drained = False
        self.stop_requested = threading.Event()
        self.trials_ended, self.stops_recorded = threading.Event(), threading.Event()
        self.num_ended_read, self.num_lines_read, self.broker_incarnation = 0, 0, ""
        self.steps_taken: dict[str, int] = {}  # trainer -> the optimizer steps that it took
        self.error: Exception | None = None
        self.clock = SuspendTolerantClock()
        self.last_contact = self.clock() + pool.spec.start_timeout  # of the broker, which has yet to start

    def run(self) -> None:
        while not self.stop_requested.wait(timeouts.SESSION_POLL_SECONDS):
            try:
                self._poll()
                self.last_contact = self.clock()
            except RayError as error:  # the broker restarts; what ended meanwhile is in the store
                if self.clock() - self.last_contact > timeouts.BROKER_LOST_SECONDS:
                    self.pool.failure_reason = (
                        f"The broker has been lost for {timeouts.BROKER_LOST_SECONDS:g} s: {format_ray_error(error)}. "
                        "What is done is kept; run the command again."
                    )
                self._enforce_budget(self.progress.live_trainers)
            except Exception as error:  # a full disk, a closed pipe: without a watch the study would hang
                self.error = error
            if self.error is not None or self.pool.failure_reason or self.is_drained:
                self._abort()
                return

    def _abort(self) -> None:
        _ABORTED.set()
        self.broker.abort.remote()
        if self.budget.is_interrupted and not self.stop_requested.is_set():
            interrupt_main_thread()  # Tune waits for its trials, up to five seconds

    def wait_for_pending_stops(self) -> None:
        """Called by the main thread when `fit` ended well: waits for the records that stopped lanes owe. They
        come, or the trainers are lost for good, which ends the watch."""
        self.trials_ended.set()
        while self.is_alive() and not self.stops_recorded.wait(timeouts.SESSION_POLL_SECONDS):
            pass

    def close(self) -> None:
        """Called by the main thread after `fit`, however that ended."""
        self.stop_requested.set()
        self.join(timeout=10)
        try:
            with suppress(RayError):
                ray.get(self.broker.close.remote(), timeout=5)
        finally:
            try:
                self.pool.shut_down(
                    timeouts.TRAINER_SHUTDOWN_SECONDS
                    if not self.budget.is_interrupted
                    else timeouts.INTERRUPT_TRAINER_SHUTDOWN_SECONDS
                )
                if self.error is None:
                    self._poll_last_updates()
            finally:
                ray.kill(self.broker)

    def _poll_last_updates(self) -> None:
        """Of the trainers. What goes wrong here must not hide what ended the study."""
        try:
            self._poll()
        except RayError:
            pass
        except Exception as error:
            self.error = error

    def _poll(self) -> None:
        trials_ended = self.trials_ended.is_set()
        updates = ray.get(
            self.broker.get_updates.remote(self.num_ended_read, self.num_lines_read, self.broker_incarnation),
            timeout=10,
        )
        if (
            updates["incarnation"] != self.broker_incarnation
        ):  # it restarted: its list of the ended began anew
            for trial, stopped in list(self.pending_stops.items()):
                ray.get(self.broker.stop.remote(trial, *stopped), timeout=10)
            self.num_ended_read, self.num_lines_read, self.broker_incarnation = 0, 0, updates["incarnation"]
        for trial, (configuration, _) in list(self.pending_stops.items()):
            fingerprint = configuration.fingerprint
            satisfied_by = self.store.get_reusable(
                fingerprint, scheduler_settings(self.scheduler, configuration)
            )
            if satisfied_by is not None or self.store.count_failures(fingerprint) >= MAX_FAILURES:
                del self.pending_stops[trial]
        for fingerprint, _ in updates["ended"]:
            record = self.store.get(fingerprint) if fingerprint not in self.cached else None
            if record is not None:
                self.progress.add_record(record)
                self.on_record(record)
        self.num_ended_read += len(updates["ended"])
        for line in updates["lines"]:
            self.progress.notify(line)
        self.num_lines_read += len(updates["lines"])
        for trainer_id, steps_taken in updates["steps_taken"].items():
            self.steps_taken[trainer_id] = max(steps_taken, self.steps_taken.get(trainer_id, 0))
        progress, counts = self.progress, updates["counts"]
        progress.steps_taken = sum(self.steps_taken.values())
        progress.training = counts.get("leased", 0) + counts.get("paused", 0)
        progress.waiting = counts.get("waiting", 0)
        progress.live_trainers = counts["trainers"]
        if progress.training and progress.first_lane_at is None:
            progress.first_lane_at = time.monotonic()
        self._enforce_budget(counts["trainers"])
        lanes_left = any(counts.get(str(phase), 0) for phase in LeasePhase if phase is not LeasePhase.ENDED)
        if trials_ended and not self.pending_stops and not lanes_left:
            self.stops_recorded.set()
        if not self.stop_requested.is_set() and self.draining_since is None:
            placed = {parse_trainer_name(t) for t in self.steps_taken}
            hung, abort_reason = updates["hung"], updates["abort_reason"]
            self.pool.update(
                progress.waiting, progress.training, counts["trainers"], placed, hung, abort_reason
            )
        progress.waiting_for = self.pool.waiting_for
        progress.refresh()

    def _enforce_budget(self, live_trainers: int) -> None:
        """Ends the study where a limit is reached: trials are let go when no trainer holds a lane any more."""
        now = time.monotonic()
        if not self.budget.update(live_trainers, now) or self.stop_requested.is_set():
            return
        if self.draining_since is None:
            self.draining_since = now
            more = "; again ends at once" if self.budget.is_interrupted else ""
            self.progress.notify(f"{self.budget.stop_reason}: the trainers save their lanes{more}")
        self.broker.drain.remote(None)  # again and again: the broker may restart meanwhile
        self.is_drained = not self.progress.training or now - self.draining_since > self.budget.save_timeout
