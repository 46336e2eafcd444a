"""The driver of a training session: it runs Tune; a thread beside it follows the broker and the trainers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator.execution import tune
from orchestrator.execution.broker import EndedLane, Updates
from orchestrator.execution.broker_actor import start_broker
from orchestrator.execution.lane_entry import LeasePhase
from orchestrator.execution.private_ray import light_trial_actors
from orchestrator.execution.ray_cluster import format_ray_error
from orchestrator.execution.schedulers import submission_order
from orchestrator.execution.settings import Session
from orchestrator.execution.trainers import TrainerPool
from orchestrator.execution.trial import TRIAL_MEMORY_BYTES, LaneTrial
from orchestrator.record.schema import LaneProgress
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.command import interrupt_main_thread
from orchestrator.util.errors import StudyError

if TYPE_CHECKING:
    from orchestrator.execution.search import Search

MAX_COLLECTING_TRIALS = 2
"""Trials at once in a grid without early stopping. The start of each takes 1.5 s of CPU time."""
MIN_AUTOSCALED_TRAINERS = 8
"""Trainers that `lane_limit` allows for at least where GPU nodes may join: a node may have eight GPUs."""


def train(
    session: Session,
    known: Sequence[Configuration],
    pending: Sequence[Configuration],
    search: Search | None = None,
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
    tune.ABORTED.clear()
    broker = start_broker(session.store, session.scheduler)
    searcher = _make_searcher(session, broker, known, pending, search, next_stage)
    pool = TrainerPool(session, broker)

    def follow_trainers(updates: Updates) -> int:
        session_now = replace(session, cluster=pool.cluster)
        num_training = None if search is None else updates.num_training
        limit = lane_limit(session_now, updates.max_lanes, num_training)
        if updates.max_lanes:
            searcher.max_concurrent = trial_limit(session_now, limit, search is not None)
        return limit

    monitor = StudyMonitor(session, broker, pool, follow_trainers)
    monitor.start()
    try:
        with light_trial_actors(tune.LaneTrainable, LaneTrial) as on_add:
            scheduler = (
                tune.LiveTrialFIFOScheduler(on_add)
                if session.scheduler == "none"
                else tune.PerGroupScheduler(session.scheduler, session.cached, session.tune_per_seed, on_add)
            )
            name, folder = session.cluster.namespace, session.settings.scratch
            results = tune.make_tuner(searcher, scheduler, name, folder).fit()
        monitor.wait_until_no_lane_is_open()
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


def lane_limit(session: Session, capacities: Sequence[int] = (), num_training: int | None = None) -> int:
    """Return the largest number of open lanes: those that wait and those that train.

    In a grid, lanes wait so that a lane that ends is replaced at once. As many wait as trainers hold. Only
    one per trainer waits under early stopping, where each open lane has a process for its trial, and in an
    elastic pool on a joined cluster, which requests nodes for lanes that wait.

    In a search, a lane that waits was suggested without the results of the lanes in training. One for each
    trainer may wait while there is room, to find out whether its group key lets it join a lane group.

    A trainer that has not reported its number of lanes counts with `TrainerSettings.expected_lanes`. Under
    early stopping on a local Ray it counts with one: the start of more trials would delay its own.

    An elastic pool on a joined cluster grows only if lanes wait. Its limit, also in a search, is that of
    twice as many trainers, and with GPUs of at least `MIN_AUTOSCALED_TRAINERS`.

    Args:
        session: The number of trainers and of their lanes, and the nodes.
        capacities: For each trainer that has reported it, the number of lanes that it can hold.
        num_training: The number of lanes on trainers in a search; None in a grid.
    """
    num_trainers, settings, local = session.num_trainers, session.settings, session.cluster.local
    is_growing = session.is_elastic and not local
    if is_growing:
        least = MIN_AUTOSCALED_TRAINERS if settings.gpus_per_worker else 0
        num_trainers = max(least, 2 * num_trainers, 2 * len(capacities))
    expected, num_untold = settings.expected_lanes, max(0, num_trainers - len(capacities))
    told = [min(one, settings.max_lanes) for one in capacities[:num_trainers]]
    if num_training is not None:
        return min(sum(told), num_training + len(told)) + num_untold * expected
    told = [max(expected, one) for one in told]
    if session.scheduler == "none" and not is_growing:
        return 2 * sum(told) + num_untold * expected
    return sum(told) + len(told) + num_untold * (1 if local else expected + 1)


def trial_limit(session: Session, num_lanes: int, is_search: bool = False) -> int:
    """Return the largest number of concurrent trials.

    Each lane needs one in a search and under early stopping, since Tune decides by its reports. Otherwise
    trials only collect what lanes report, and few do. All trial processes together may use half of the memory
    that Ray manages; the other half is for trainers.

    Args:
        session: The early stopping, and the nodes with their memory.
        num_lanes: The largest number of lanes.
        is_search: True if trials are suggested by a search.
    """
    wanted = num_lanes if is_search or session.scheduler != "none" else MAX_COLLECTING_TRIALS
    return max(1, min(wanted, num_lanes, int(session.cluster.memory / 2 / TRIAL_MEMORY_BYTES)))


def _make_searcher(
    session: Session,
    broker: Any,
    known: Sequence[Configuration],
    pending: Sequence[Configuration],
    search: Search | None,
    next_stage: Callable[[], Sequence[Configuration]],
) -> Any:
    """Return Tune's searcher; the monitor changes its `max_concurrent`."""
    lanes, num_lanes = session.settings.expected_lanes, lane_limit(session, (), None if search is None else 0)
    limit = trial_limit(session, num_lanes, search is not None)

    def call_broker(method: str, *arguments: Any) -> None:
        if not tune.ABORTED.is_set():
            with suppress(RayActorError):  # the broker is lost; the monitor ends the study
                ray.get(getattr(broker, method).remote(*arguments))

    if search is not None:
        from orchestrator.execution.searcher import PerGroupSearcher

        return PerGroupSearcher(call_broker, search, session.scheduler, lanes, session.cached, limit)

    def prepare(
        pending: Sequence[Configuration], known: Sequence[Configuration] = ()
    ) -> Sequence[Configuration]:
        ordered = submission_order(session.scheduler, known, pending, lanes, session.num_trainers)
        if session.scheduler == "none":
            broker.request.remote(ordered)
        return ordered

    if session.scheduler == "none":  # more trials would delay the start of the trainers
        limit = 1
    return tune.ConfigurationQueue(call_broker, prepare(pending, known), limit, lambda: prepare(next_stage()))


class StudyMonitor(threading.Thread):
    """A thread that follows the broker and manages the trainers while `Tuner.fit` blocks.

    Args:
        session: Settings, storage and observers.
        broker: The handle of the broker's actor.
        pool: The trainers.
        follow_trainers: Called with each answer of the broker; returns the largest number of lanes.
    """

    def __init__(
        self,
        session: Session,
        broker: Any,
        pool: TrainerPool,
        follow_trainers: Callable[[Updates], int],
    ) -> None:
        super().__init__(name="monitor", daemon=True)
        self.session, self.broker, self.pool = session, broker, pool
        self.follow_trainers = follow_trainers
        self.budget, self.progress = session.budget, session.progress
        self.draining_since: float | None = None
        """Time at which the trainers were told to save their lanes because the study ends; None before."""
        self.is_drained = False
        self.stop_requested = threading.Event()
        self.trials_ended, self.all_ended = threading.Event(), threading.Event()
        self.num_read = 0
        """Number of the broker's events that were read."""
        self.max_open_lanes = 0
        self.steps_taken: dict[str, int] = {}
        """Optimizer steps by trainer."""
        self.error: Exception | None = None

    def run(self) -> None:
        """Start the first trainers, then poll until `close` is called or the study cannot continue."""
        try:
            self.pool.update(Updates())  # while the broker starts
            is_last = False
            while not (self.is_over or is_last):
                is_last = self.stop_requested.wait(timeouts.SESSION_POLL_SECONDS)
                self._poll()
        except (RayActorError, GetTimeoutError) as error:
            with suppress(RayError):
                ray.kill(self.broker)  # its callers then get an error, too
            if not self.stop_requested.is_set():
                lost = f"The broker was lost: {format_ray_error(error)}"
                self.pool.failure_reason = f"{lost}. Finished work is kept; run the command again."
        except Exception as error:  # such as a full disk: without its monitor the study would hang
            self.error = error
        if self.is_over:
            self._abort()

    @property
    def is_over(self) -> bool:
        """True if the study cannot or shall not continue."""
        return self.error is not None or bool(self.pool.failure_reason) or self.is_drained

    def wait_until_no_lane_is_open(self) -> None:
        """Wait in the main thread, after `fit`, until all stopped lanes have a record or the monitor ends."""
        self.trials_ended.set()
        while self.is_alive() and not self.all_ended.wait(timeouts.SESSION_POLL_SECONDS):
            pass

    def close(self) -> None:
        """End the trainers and the broker. The main thread calls this after `fit` has returned or raised."""
        self.stop_requested.set()
        try:
            self.join(timeout=timeouts.MONITOR_JOIN_SECONDS)
            self.pool.shut_down()
        finally:
            ray.kill(self.broker)

    def _abort(self) -> None:
        tune.ABORTED.set()
        self.broker.abort.remote()
        if self.budget.is_interrupted and not self.stop_requested.is_set():
            interrupt_main_thread()  # Tune would wait up to five seconds for its trials

    def _poll(self) -> None:
        trials_ended = self.trials_ended.is_set()
        ended = self.pool.list_ended()
        answer = self.broker.get_updates.remote(self.num_read, self.max_open_lanes)
        updates: Updates = ray.get(answer, timeout=timeouts.TRAINER_SILENT_SECONDS)
        self.max_open_lanes = self.follow_trainers(updates)
        self._read_events(updates)
        counts, progress = updates.counts, self.progress
        self._show_counts(updates)
        self._enforce_budget(progress.live_trainers)
        if trials_ended and not sum(counts[phase] for phase in LeasePhase if phase is not LeasePhase.ENDED):
            self.all_ended.set()
        if not self.stop_requested.is_set():
            self.pool.update(updates, ended, may_start=self.draining_since is None)
        progress.waiting_for = self.pool.waiting_for
        progress.refresh()

    def _read_events(self, updates: Updates) -> None:
        """Pass on the new starts, reports and records of lanes, the trainers' lines, and their steps."""
        self.num_read += len(updates.events)
        for event in updates.events:
            if isinstance(event, LaneProgress):
                self.session.on_progress(event)
            elif isinstance(event, EndedLane):
                is_new = event.fingerprint not in self.session.cached
                if is_new and (record := self.session.store.get(event.fingerprint)):
                    self.progress.add_record(record)
                    self.session.on_record(record)
            else:
                self.progress.notify(event)
        self.steps_taken |= updates.steps_taken

    def _show_counts(self, updates: Updates) -> None:
        counts, progress = updates.counts, self.progress
        progress.count_steps(sum(self.steps_taken.values()))
        progress.training = updates.num_training
        progress.live_trainers = counts["trainers"]
        if progress.training and progress.first_lane_at is None:
            progress.first_lane_at = time.monotonic()

    def _enforce_budget(self, live_trainers: int) -> None:
        """Update the count of GPU hours, and drain the trainers once a limit of the run is reached.

        Drained trainers save their lanes and give them back. The study counts as drained when no lane is in
        training any more, or after `RunBudget.save_timeout` seconds.

        Args:
            live_trainers: Number of trainers that reserve GPUs.
        """
        now = time.monotonic()
        if not self.budget.update(live_trainers, now) or self.stop_requested.is_set():
            return
        if self.draining_since is None:
            self.draining_since = now
            more = "; again ends at once" if self.budget.is_interrupted else ""
            self.progress.notify(f"{self.budget.stop_reason}: the trainers save their lanes{more}")
            self.broker.drain.remote(None)
        self.is_drained = not self.progress.training or now - self.draining_since > self.budget.save_timeout
