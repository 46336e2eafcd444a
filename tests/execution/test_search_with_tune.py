"""A search with early stopping in Tune's own loop, without trainers.

No trial waits for ever, and the budgets of the variants are equal whichever trials the scheduler stops.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from search_drive import build, space

from orchestrator.execution.search.budget import SearchBudget, open_search
from orchestrator.execution.search.journal import FINGERPRINT
from orchestrator.execution.search.searcher import PerGroupSearcher
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

POINTS = 9


def run(folder: Path, scheduler: str, at_once: int) -> tuple[SearchBudget, PerGroupSearcher, list[Any]]:
    """Search with lanes whose loss is 1 - score, evaluated after 30, 60 and 90 steps."""
    from ray import tune

    from orchestrator.execution.tune.per_group_scheduler import PerGroupScheduler

    class Lane(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.point, self.at = Configuration.from_json(config["configuration"]), 0

        def step(self) -> dict[str, Any]:
            self.at += 1
            last = self.at > 3
            rate = self.point.optimizer.learning_rate
            # Not `search_drive.score`, because Tune's workers cannot import other test modules.
            good = 1 - abs(math.log10(rate) + 2) / 4
            result = {"step": 30 * min(3, self.at), "score": good}
            return {**result, "loss": 1 - good, "state": "finished" if last else "training", "done": last}

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.setup(config)
            return True

        def save_checkpoint(self, folder: str) -> dict[str, Any]:
            return {"at": self.at}

        def load_checkpoint(self, checkpoint: Any) -> None:
            self.at = checkpoint["at"]

    over = space("rank=4,8,16")
    templates = [build(variant, {}) for variant in over.variants]
    budget = open_search(folder, "tpe", POINTS, {"letters": over}, templates)
    search = PerGroupSearcher(budget, Store(folder / "store"), scheduler, 2, set())
    tuner = tune.Tuner(
        tune.with_resources(Lane, tune.PlacementGroupFactory([{"CPU": 2 / at_once}])),
        param_space={},
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            scheduler=None if scheduler == "none" else PerGroupScheduler(scheduler, search.cached),
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "tune"),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    results = tuner.fit()
    assert not results.errors
    return budget, search, [result.metrics for result in results]


@pytest.mark.ray
def test_a_search_and_a_scheduler_end_with_equal_budgets(connected: Cluster, tmp_path: Path) -> None:
    budget, search, metrics = run(tmp_path, "asha", 4)
    assert Counter(point.group for point in budget.points.values()) == {"lora": POINTS, "hira": POINTS}
    assert len(metrics) == 2 * POINTS
    ended = Counter(m["state"] for m in metrics)
    assert set(ended) == {"finished", "training"}, "some were stopped, some came to their end"
    optuna_trials = [
        t for group in search.searches.values() for t in group.study.trials if FINGERPRINT in t.user_attrs
    ]
    states = Counter(trial.state.name for trial in optuna_trials)
    assert (states["COMPLETE"], states["PRUNED"]) == (ended["finished"], ended["training"])
    assert not states["RUNNING"]
    assert all(t.intermediate_values for t in optuna_trials if t.state.name == "PRUNED")
    assert not search.trials
