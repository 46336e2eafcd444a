"""Trains configurations on a cluster: Tune's trials on one side, seats on the other, a broker between."""

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

from orchestrator.execution.broker.actor import BROKER_LOST_SECONDS, start_broker
from orchestrator.execution.broker.core import name_of
from orchestrator.execution.broker.lane_entry import Phase
from orchestrator.execution.progress import Progress
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.run_budget import Limits
from orchestrator.execution.search.searcher import PerGroupSearch
from orchestrator.execution.trainers.exit_status import reason
from orchestrator.execution.trainers.pool import Seats
from orchestrator.execution.trainers.storage_visibility import Sight
from orchestrator.execution.trainers.trainer import SeatPlan
from orchestrator.execution.tune.early_stopping import PerGroup
from orchestrator.execution.tune.fifo import FirstComeFirstServed, InOrder
from orchestrator.execution.tune.rungs import settings
from orchestrator.execution.tune.trial import MEMORY_BYTES, Trial
from orchestrator.record.schema import FAILURES_ALLOWED, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util.command import let_go
from orchestrator.util.errors import Trouble
from orchestrator.util.watched_clock import WatchedClock

# Tune hands these to its trials in a runtime environment, which Ray writes into a log and into the command
# lines of the processes that it starts. Trials talk to the broker alone.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
)

LOOK_SECONDS = 0.5
SEATS_TO_COME = 8  # a GPU node's
TRIAL_DEATHS_ALLOWED = 20
LAST_SECONDS = 5.0  # what seats get to end by themselves
MOMENT_SECONDS = 0.5  # the same after Ctrl-C: what they had to say is said


@dataclass(frozen=True)
class Room:
    """How many seats, and the lanes of each. `follow`: `seats` are those of now, and as nodes come and go
    there may be more or fewer; with an autoscaler `to_come`, of which it is known."""

    seats: int
    plan: SeatPlan
    follow: bool = False
    to_come: int = 0

    def trials(self, cluster: Cluster, scheduler: str) -> tuple[int | None, int]:
        """Trials at once, and the bytes that each asks Ray for. As many as the lanes of all seats and a pack
        each to take next, as far as memory for their processes goes: half of what Ray may promise, the rest
        is the seats'. Hyperband pauses a trial until all of its bracket have come as far, and Tune counts
        paused ones: there the same limit is kept by what each asks for, on whichever node. Tune's limit
        holds to the end: a cluster of GPUs that may grow gets one for twice its seats."""
        growing = self.follow and not cluster.local and self.plan.gpus
        seats = max(SEATS_TO_COME, 2 * self.seats, self.to_come) if growing else self.seats
        wanted = 2 * seats * self.plan.lanes
        if scheduler == "hyperband":
            share = max(cluster.memory / wanted, 2 * MEMORY_BYTES)
            return None, int(min(share, max(node.memory for node in cluster.nodes)))
        return max(1, min(wanted, int(cluster.memory / 2 / MEMORY_BYTES))), MEMORY_BYTES


def train(
    configurations: Sequence[Configuration],
    known: Collection[str],
    scheduler: str,
    cluster: Cluster,
    room: Room,
    store: Store,
    scratch: Path,
    progress: Progress,
    ended: Callable[[Record], None],
    limits: Limits,
    search: PerGroupSearch | None = None,
) -> int:
    """Trains all of `configurations`, in this order, but for the `known` ones (fingerprints), whose results
    are replayed to the scheduler; `ended` is called with each new record, from another thread. When one of
    `limits` is reached the seats save their lanes, and the rest is left. Returns the optimizer steps that
    seats have taken. With a `search` it is that which names the configurations, and adds to `known`.

    Raises Trouble when no seat can be had. Whatever happens, seats and broker are gone afterwards.
    """
    _HOPELESS.clear()
    broker = start_broker(store, scheduler)
    sight = Sight(scratch, cluster.nodes, progress.say)
    seats = Seats(
        room.plan, room.seats, cluster.namespace, broker, sight, progress.say, room.follow, room.to_come
    )
    owed: Owed = {}
    watch = _Watch(broker, seats, store, progress, known, scheduler, owed, ended, limits)
    watch.start()
    trials, memory = room.trials(cluster, scheduler)
    if search and trials:
        trials = max(1, trials // 2)  # what waits beside the lanes was suggested knowing less
    try:
        tuner = tune.Tuner(
            tune.with_resources(Trial, tune.PlacementGroupFactory([{"memory": memory}])),
            tune_config=tune.TuneConfig(
                search_alg=search or InOrder(configurations, trials),
                num_samples=-1 if search else 1,  # the search says when it is done
                max_concurrent_trials=trials if search else None,
                scheduler=FirstComeFirstServed() if scheduler == "none" else PerGroup(scheduler, known),
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=cluster.namespace,
                storage_path=str(scratch),
                verbose=0,
                callbacks=[_TellBroker(broker, owed)],
                stop=_WhenHopeless(),
                # Of trial processes, which run no user's code and may lose a node now and then; lanes are the
                # broker's.
                failure_config=tune.FailureConfig(max_failures=TRIAL_DEATHS_ALLOWED),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        watch.settle()
    finally:
        watch.finish()
    if watch.error is not None:
        raise watch.error
    if watch.seats.trouble:
        raise Trouble(watch.seats.trouble)
    for error in results.errors[:1]:
        progress.say(
            f"{len(results.errors)} trials failed, the first with: {str(error).strip().splitlines()[-1]}"
        )
    return sum(watch.taken.values())


def _name(trial: Any) -> str:
    return f"{Configuration.from_json(trial.config['configuration']).fingerprint[:12]}-{trial.trial_id}"


_HOPELESS = threading.Event()  # not a part of the stopper, which Tune pickles


class _WhenHopeless(tune.Stopper):
    """Ends Tune's loop when the watch has given up; the broker lets the waiting trials go."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _HOPELESS.is_set()


Owed = dict[str, tuple[Configuration, int]]
"""Trials that the scheduler has stopped, while the store has no record of it: what, and after which step. The
broker forgets it when it restarts."""


class _TellBroker(tune.Callback):
    """Which trials have ended, and how: from here, since a killed trial or a paused one cannot say it."""

    def __init__(self, broker: Any, owed: Owed) -> None:
        self.broker, self.owed = broker, owed

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """One that ends by itself says in which state its lane did; others were stopped by the scheduler."""
        if trial.last_result.get("state") == "training":
            stopped = Configuration.from_json(trial.config["configuration"]), trial.last_result["step"]
            self.owed[trial.trial_id] = stopped
            self._tell(self.broker.stop, trial.trial_id, *stopped)
        else:
            self._tell(self.broker.release, trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(self.broker.release, trial.trial_id)

    def _tell(self, method: Any, *args: Any) -> None:
        """Waits until the broker knows: what is owed when all trials have ended is counted there."""
        while not _HOPELESS.is_set():
            try:
                ray.get(method.remote(*args))
                return
            except ActorUnavailableError:  # it restarts
                time.sleep(0.5)
            except ActorDiedError:  # for good; the watch ends the study
                return


class _Watch(threading.Thread):
    """Beside `Tuner.fit`, which blocks: keeps the seats, reads the records of ended lanes, shows progress."""

    def __init__(
        self,
        broker: Any,
        seats: Seats,
        store: Store,
        progress: Progress,
        known: Collection[str],
        scheduler: str,
        owed: Owed,
        ended: Callable[[Record], None],
        limits: Limits,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.broker, self.seats, self.store, self.progress = broker, seats, store, progress
        self.known, self.scheduler, self.owed, self.ended = known, scheduler, owed, ended
        self.limits = limits
        self.leaving: float | None = None  # since when seats save their lanes, for the end of the study
        self.left = False
        self.stop = threading.Event()
        self.all_told, self.settled = threading.Event(), threading.Event()
        self.read, self.lines, self.born = 0, 0, ""
        self.taken: dict[str, int] = {}  # seat -> the optimizer steps that it took
        self.error: Exception | None = None
        self.clock = WatchedClock()
        self.heard = self.clock() + seats.plan.start_seconds  # of the broker, which has yet to start

    def run(self) -> None:
        while not self.stop.wait(LOOK_SECONDS):
            try:
                self._look()
                self.heard = self.clock()
            except RayError as error:  # the broker restarts; what ended meanwhile is in the store
                if self.clock() - self.heard > BROKER_LOST_SECONDS:
                    self.seats.trouble = (
                        f"The broker has been lost for {BROKER_LOST_SECONDS:g} s: {reason(error)}. "
                        "What is done is kept; run the command again."
                    )
                self._limit(self.progress.seats)
            except Exception as error:  # a full disk, a closed pipe: without a watch the study would hang
                self.error = error
            if self.error is not None or self.seats.trouble or self.left:
                self._give_up()
                return

    def _give_up(self) -> None:
        _HOPELESS.set()
        self.broker.give_up.remote()
        if self.limits.hasty and not self.stop.is_set():
            let_go()  # Tune waits for its trials, up to five seconds

    def settle(self) -> None:
        """Called by the main thread when `fit` ended well: waits for the records that stopped lanes owe. They
        come, or the seats are lost for good, which ends the watch."""
        self.all_told.set()
        while self.is_alive() and not self.settled.wait(LOOK_SECONDS):
            pass

    def finish(self) -> None:
        """Called by the main thread after `fit`, however that ended."""
        self.stop.set()
        self.join(timeout=10)
        try:
            with suppress(RayError):
                ray.get(self.broker.close.remote(), timeout=5)
        finally:
            try:
                self.seats.end(LAST_SECONDS if not self.limits.hasty else MOMENT_SECONDS)
                if self.error is None:
                    self._last_words()
            finally:
                ray.kill(self.broker)

    def _last_words(self) -> None:
        """Of the seats. What goes wrong here must not hide what ended the study."""
        try:
            self._look()
        except RayError:
            pass
        except Exception as error:
            self.error = error

    def _look(self) -> None:
        all_told = self.all_told.is_set()
        news = ray.get(self.broker.news.remote(self.read, self.lines, self.born), timeout=10)
        if news["born"] != self.born:  # it restarted: its list of the ended began anew
            for trial, stopped in list(self.owed.items()):
                ray.get(self.broker.stop.remote(trial, *stopped), timeout=10)
            self.read, self.lines, self.born = 0, 0, news["born"]
        for trial, (configuration, _) in list(self.owed.items()):
            fingerprint = configuration.fingerprint
            met = self.store.meets(fingerprint, settings(self.scheduler, configuration))
            if met is not None or self.store.failures(fingerprint) >= FAILURES_ALLOWED:
                del self.owed[trial]
        for fingerprint, _ in news["ended"]:
            record = self.store.get(fingerprint) if fingerprint not in self.known else None
            if record is not None:
                self.progress.ended(record)
                self.ended(record)
        self.read += len(news["ended"])
        for line in news["lines"]:
            self.progress.say(line)
        self.lines += len(news["lines"])
        for seat, taken in news["taken"].items():
            self.taken[seat] = max(taken, self.taken.get(seat, 0))
        progress, counts = self.progress, news["counts"]
        progress.taken = sum(self.taken.values())
        progress.training = counts.get("leased", 0) + counts.get("parked", 0)
        progress.waiting = counts.get("waiting", 0)
        progress.seats = counts["seats"]
        if progress.training and progress.first_lane is None:
            progress.first_lane = time.monotonic()
        self._limit(counts["seats"])
        lanes_left = any(counts.get(str(phase), 0) for phase in Phase if phase is not Phase.ENDED)
        if all_told and not self.owed and not lanes_left:
            self.settled.set()
        if not self.stop.is_set() and self.leaving is None:
            spoken = {name_of(seat) for seat in self.taken}
            stuck, hopeless = news["stuck"], news["hopeless"]
            self.seats.look(progress.waiting, progress.training, counts["seats"], spoken, stuck, hopeless)
        progress.waits_for = self.seats.waits_for
        progress.show()

    def _limit(self, live: int) -> None:
        """Ends the study where a limit is reached: trials are let go when no seat holds a lane any more."""
        now = time.monotonic()
        if not self.limits.look(live, now) or self.stop.is_set():
            return
        if self.leaving is None:
            self.leaving = now
            more = "; again ends at once" if self.limits.hasty else ""
            self.progress.say(f"{self.limits.reached}: the seats save their lanes{more}")
        self.broker.vacate.remote(None)  # again and again: the broker may restart meanwhile
        self.left = not self.progress.training or now - self.leaving > self.limits.save_seconds
