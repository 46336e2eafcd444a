"""The driver between Tune and the broker: a callback of Tune, and a thread that follows the broker.

The thread manages the trainers while `Tuner.fit` blocks.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from orchestrator.execution.broker.assignment import parse_trainer_name
from orchestrator.execution.broker.lane_entry import LeasePhase
from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.rungs import find_settled
from orchestrator.execution.settings import Session
from orchestrator.execution.trainers.pool import BrokerState, TrainerPool
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.graceful_interrupts import interrupt_main_thread

ABORTED = threading.Event()
"""Set when the study cannot continue. It is a global, because Tune pickles its stoppers."""

PendingStops = dict[str, tuple[Configuration, int]]
"""Trials that the scheduler has stopped and whose lanes have no record yet. The value is the configuration
and the step of the last report that the scheduler saw. The driver keeps these trials, because a broker that
restarts has forgotten them."""


class AbortStopper(tune.Stopper):
    """Stopper that ends Tune's loop once ABORTED is set."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether the study was aborted."""
        return ABORTED.is_set()


class BrokerCallback(tune.Callback):
    """Callback that tells the broker how trials end, since killed or paused trials cannot do so themselves.

    Args:
        broker: The handle of the broker's actor.
        pending_stops: Receives each trial that the scheduler stops.
    """

    def __init__(self, broker: Any, pending_stops: PendingStops) -> None:
        self.broker, self.pending_stops = broker, pending_stops

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Release the trial if its lane ended; otherwise the scheduler has stopped it."""
        if trial.last_result.get("state") == "training":
            stopped = trial.config["configuration"], trial.last_result["step"]
            self.pending_stops[trial.trial_id] = stopped
            self._call_broker(self.broker.stop, trial.trial_id, *stopped)
        else:
            self._call_broker(self.broker.release, trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Release the trial."""
        self._call_broker(self.broker.release, trial.trial_id)

    def _call_broker(self, method: Any, *args: Any) -> None:
        """Call the broker and wait for its answer: when `fit` returns, the broker must know of every end."""
        while not ABORTED.is_set():
            try:
                ray.get(method.remote(*args))
                return
            except ActorUnavailableError:  # the broker restarts
                time.sleep(0.5)
            except ActorDiedError:  # it is lost for good; the monitor ends the study
                return


class StudyMonitor(threading.Thread):
    """Poll the broker: manage trainers, pass on new records, show progress, and enforce the budget.

    Args:
        session: Settings, storage and observers.
        broker: The handle of the broker's actor.
        pool: The trainers.
        stops: Stopped trials whose lanes have no record yet; `BrokerCallback` adds to them.
        follow_trainers: Called with every answer of the broker; sets the number of concurrent trials.
    """

    def __init__(
        self,
        session: Session,
        broker: Any,
        pool: TrainerPool,
        stops: PendingStops,
        follow_trainers: Callable[[Mapping[str, Any]], None] = lambda updates: None,
    ) -> None:
        super().__init__(name="monitor", daemon=True)
        self.session, self.broker, self.pool, self.pending_stops = session, broker, pool, stops
        self.follow_trainers = follow_trainers
        self.budget, self.progress = session.budget, session.progress
        self.draining_since: float | None = None
        """Time at which the trainers were told to save their lanes because the study ends; None before."""
        self.is_drained = False
        self.stop_requested = threading.Event()
        self.trials_ended, self.stops_recorded = threading.Event(), threading.Event()
        self.num_ended_read, self.num_progress_read, self.num_lines_read = 0, 0, 0
        self.incarnation = ""
        """The incarnation of the broker to whose lists the three numbers refer."""
        self.steps_taken: dict[str, int] = {}
        """Optimizer steps by trainer."""
        self.error: Exception | None = None
        # The broker may take as long to start as a trainer.
        self.silent_since: float | None = time.monotonic() + session.settings.start_timeout
        """Time of the first poll without an answer; None after an answer."""

    def run(self) -> None:
        """Start the first trainers, then poll until `close` is called or the study cannot continue."""
        self._start_first_trainers()
        while not self.stop_requested.wait(timeouts.SESSION_POLL_SECONDS):
            try:
                self._poll()
                self.silent_since = None
            except RayError as error:  # the broker restarts; lanes that end meanwhile are in the store
                now = time.monotonic()
                self.silent_since = self.silent_since or now
                if now - self.silent_since > timeouts.BROKER_LOST_SECONDS:
                    self.pool.failure_reason = (
                        f"The broker has been lost for {timeouts.BROKER_LOST_SECONDS:g} s: "
                        f"{format_ray_error(error)}. Finished work is kept; run the command again."
                    )
                self._enforce_budget(self.progress.live_trainers)
            except Exception as error:  # such as a full disk: without its monitor the study would hang
                self.error = error
            if self.error is not None or self.pool.failure_reason or self.is_drained:
                self._abort()
                return

    def _start_first_trainers(self) -> None:
        """Start trainers while the broker and the trials start."""
        try:
            self.pool.update(BrokerState())
        except RayError:
            pass  # the first poll starts them
        except Exception as error:
            self.error = error

    def wait_for_pending_stops(self) -> None:
        """Wait in the main thread, after `fit`, until all stopped lanes have a record or the monitor ends."""
        self.trials_ended.set()
        while self.is_alive() and not self.stops_recorded.wait(timeouts.SESSION_POLL_SECONDS):
            pass

    def close(self) -> None:
        """End the trainers and the broker. The main thread calls this after `fit` has returned or raised."""
        self.stop_requested.set()
        self.join(timeout=10)
        try:
            with suppress(RayError):
                ray.get(self.broker.close.remote(), timeout=5)
        finally:
            try:
                if self.budget.is_interrupted:
                    self.pool.shut_down(
                        timeouts.INTERRUPT_TRAINER_SHUTDOWN_SECONDS,
                        timeouts.INTERRUPT_TRAINER_THREAD_JOIN_SECONDS,
                    )
                else:
                    self.pool.shut_down(timeouts.TRAINER_SHUTDOWN_SECONDS)
                if self.error is None:
                    self._poll_last_updates()
            finally:
                ray.kill(self.broker)

    def _abort(self) -> None:
        ABORTED.set()
        self.broker.abort.remote()
        if self.budget.is_interrupted and not self.stop_requested.is_set():
            interrupt_main_thread()  # Tune would wait up to five seconds for its trials

    def _poll_last_updates(self) -> None:
        """Poll once more, and ignore errors of Ray, which would hide the error that ended the study."""
        try:
            self._poll()
        except RayError:
            pass
        except Exception as error:
            self.error = error

    def _poll(self) -> None:
        trials_ended = self.trials_ended.is_set()
        num_read = self.num_ended_read, self.num_progress_read, self.num_lines_read
        updates = ray.get(self.broker.get_updates.remote(*num_read, self.incarnation), timeout=10)
        if updates["incarnation"] != self.incarnation:
            self._resume_after_restart(updates["incarnation"])
        self.follow_trainers(updates)
        self._forget_recorded_stops()
        self._read_ended_lanes(updates)
        counts, progress = updates["counts"], self.progress
        self._show_counts(counts)
        self._enforce_budget(progress.live_trainers + len(updates["holders"]))  # holders reserve GPUs, too
        num_open = sum(counts[phase] for phase in LeasePhase if phase is not LeasePhase.ENDED)
        if trials_ended and not self.pending_stops and not num_open:
            self.stops_recorded.set()
        if not self.stop_requested.is_set() and self.draining_since is None:
            self.pool.update(
                BrokerState(
                    progress.waiting,
                    progress.training,
                    progress.live_trainers,
                    placed=frozenset(map(parse_trainer_name, self.steps_taken)),
                    hung=updates["hung"],
                    excluded_devices=updates["excluded_devices"],
                    holders=updates["holders"],
                    abort_reason=updates["abort_reason"],
                )
            )
        progress.waiting_for = self.pool.waiting_for
        progress.refresh()

    def _resume_after_restart(self, incarnation: str) -> None:
        """Repeat the pending stops to a restarted broker, and read its new lists from their start."""
        for trial, stopped in list(self.pending_stops.items()):
            ray.get(self.broker.stop.remote(trial, *stopped), timeout=10)
        self.num_ended_read, self.num_progress_read, self.num_lines_read = 0, 0, 0
        self.incarnation = incarnation

    def _forget_recorded_stops(self) -> None:
        for trial, (configuration, _) in list(self.pending_stops.items()):
            if find_settled(self.session.store, configuration.fingerprint, self.session.scheduler):
                del self.pending_stops[trial]

    def _read_ended_lanes(self, updates: dict[str, Any]) -> None:
        """Pass on the new starts, reports and records of lanes, the trainers' lines, and their steps."""
        for progress in updates["progress"]:  # before the records: an ended lane is no longer in training
            self.session.on_progress(progress)
        self.num_progress_read += len(updates["progress"])
        for fingerprint, _ in updates["ended"]:
            if fingerprint in self.session.cached:
                continue
            if record := self.session.store.get(fingerprint):
                self.progress.add_record(record)
                self.session.on_record(record)
        self.num_ended_read += len(updates["ended"])
        for line in updates["lines"]:
            self.progress.notify(line)
        self.num_lines_read += len(updates["lines"])
        for trainer_id, steps_taken in updates["steps_taken"].items():
            self.steps_taken[trainer_id] = max(steps_taken, self.steps_taken.get(trainer_id, 0))

    def _show_counts(self, counts: Counter[str]) -> None:
        progress = self.progress
        progress.count_steps(sum(self.steps_taken.values()))
        progress.training = counts[LeasePhase.LEASED] + counts[LeasePhase.PAUSED]
        progress.waiting = counts[LeasePhase.WAITING]
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
        self.broker.drain.remote(None)  # at every poll, because the broker may restart meanwhile
        self.is_drained = not self.progress.training or now - self.draining_since > self.budget.save_timeout
