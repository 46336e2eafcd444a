"""Tune's callback that informs the broker about trials, and the stopper with which the monitor ends Tune."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorDiedError, ActorUnavailableError

from orchestrator.study.configuration import Configuration

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
            stopped = Configuration.from_json(trial.config["configuration"]), trial.last_result["step"]
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
