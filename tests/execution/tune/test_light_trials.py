"""Trials in Ray Tune's own loop, in processes without Ray Tune. The broker replays known results to them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import study
from points import POINTS, STEPS, configuration, record
from ray.cluster_utils import Cluster

from orchestrator.execution.broker.actor import start_broker
from orchestrator.execution.ray.private import light_trial_actors, retry_after_death_in_reset
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES, LaneTrial
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

HEAVY = ("ray.tune", "ray.train", "torch", "transformers", "pandas")  # Ray itself loads pyarrow in actors
FIRST, SECOND, THIRD = POINTS[:3]
DIES, RAISES, DIES_IN_RESET = (configuration(rate=rate) for rate in (0.1, 0.2, 0.3))


def observed_trial(folder: Path) -> type:
    """Return a class of trials that also report about their process and fail on three configurations.

    The class is local, because the processes of trials cannot import this module.

    Args:
        folder: An empty folder. The trial of DIES ends its process at its second result, that of
            DIES_IN_RESET when it takes over a process; both do so once only.
    """

    class ObservedTrial(LaneTrial):
        trials_here = 0

        def reset(self, new_config: dict[str, Any], storage: object = None) -> bool:
            self.trials_here += 1
            super().reset(new_config)
            if self.configuration == DIES_IN_RESET:
                self.die_once()
            return True

        def die_once(self) -> None:
            pid_file = folder / f"died-{self.configuration.fingerprint}"
            if not pid_file.exists():
                pid_file.write_text(str(os.getpid()))
                os._exit(1)

        def train(self) -> dict[str, Any]:
            if self.configuration == RAISES:
                raise RuntimeError("an error in the process of a trial")
            if self.configuration == DIES and self.num_results == 1:
                self.die_once()
            return {
                **super().train(),
                "loaded": [name for name in HEAVY if name in sys.modules],
                "own_id": self.trial_id,
                "trained": self.configuration.to_json(),
                "trials_here": self.trials_here,
            }

    return ObservedTrial


def test_trials_share_a_light_process_and_their_ends_are_seen(
    connected: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment asks Tune to fetch results in batches, by a method that these actors do not have."""
    from ray import tune
    from ray.train._internal.storage import StorageContext
    from ray.tune.stopper import TimeoutStopper

    from orchestrator.execution.session import LaneTrainable
    from orchestrator.execution.tune.fifo import ConfigurationListGenerator, LiveTrialFIFOScheduler
    from orchestrator.execution.tune.trial_events import ABORTED, BrokerCallback

    monkeypatch.setenv("TUNE_RESULT_BUFFER_LENGTH", "5")
    ABORTED.clear()
    points, store = [FIRST, SECOND, DIES, RAISES, THIRD, DIES_IN_RESET], Store(tmp_path / "store")
    for point in points:
        store.put(record(point, "finished"))
    broker = start_broker(store, "none")
    tuner = tune.Tuner(
        tune.with_resources(LaneTrainable, tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES}])),
        tune_config=tune.TuneConfig(
            search_alg=ConfigurationListGenerator(points, max_concurrent=1),
            scheduler=LiveTrialFIFOScheduler(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            verbose=0,
            callbacks=[BrokerCallback(broker, {})],
            # A trial that Ray never starts fails this test; without the limit it would hang.
            stop=TimeoutStopper(study.HANG_SECONDS),
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with light_trial_actors(LaneTrainable, observed_trial(tmp_path)), retry_after_death_in_reset():
        results = tuner.fit()
    updates = ray.get(broker.get_updates.remote(0, 0, 0, ""), timeout=study.HANG_SECONDS)
    ray.kill(broker)

    assert len(results) == len(points)
    first, second, died, raised, third, died_in_reset = results  # in the order of `points`
    assert [one.error is not None for one in results] == [False, False, False, True, False, False]
    assert "an error in the process of a trial" in str(raised.error)
    for point, one in zip(points, results, strict=True):
        if one is raised:
            continue
        assert one.metrics is not None
        assert one.metrics["loaded"] == []
        assert one.metrics["own_id"] == one.metrics["trial_id"]
        assert Configuration.from_json(one.metrics["trained"]) == point
        assert (one.metrics["state"], one.metrics["step"], one.metrics["done"]) == ("finished", STEPS, True)
        assert one.metrics["training_iteration"] == STEPS + 1, "each report, and the end"
    assert [one.metrics["trials_here"] for one in (first, second) if one.metrics] == [1, 2]
    pids = [one.metrics["pid"] for one in (first, second, died, third, died_in_reset) if one.metrics]
    ends = [int((tmp_path / f"died-{one.fingerprint}").read_text()) for one in (DIES, DIES_IN_RESET)]
    assert (pids[0], pids[1], pids[3]) == (ends[0], ends[0], ends[1])
    assert (pids[2] != ends[0], pids[4] != ends[1]) == (True, True)
    updates["counts"].pop("ended")
    assert not updates["counts"].total(), "all are released"
    context = StorageContext(str(tmp_path), "afterwards")
    assert isinstance(ray.get(ray.put(context)), StorageContext), "Ray sends it unchanged again"
