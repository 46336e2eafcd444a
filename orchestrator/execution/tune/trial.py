"""Tune's trial: one configuration, a thin client of the broker. It imports no torch and asks for memory,
not CPU, so that trials never take the cores that trainers train on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorDiedError, ActorUnavailableError

from orchestrator.execution.broker.actor import BROKER_NAME
from orchestrator.execution.tune.rungs import evaluation_index, lane_evaluation_steps
from orchestrator.finetune.engine.lane_source import Report
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

TRIAL_MEMORY_BYTES = 300 * 2**20  # a trial's process with Ray Tune imported: 190 MiB measured, Linux x86-64


WORST_LOSS = 1e9  # finite: NaN and infinities poison schedulers


class LaneTrainable(tune.Trainable):
    """`config` holds "configuration" (its JSON). Every `step` waits for the lane's next report, and lets the
    lane go on if it was parked after the last one; the last result has `done` and the state in which the lane
    ended.

    Nothing is released here: a process that ends, or is given another trial, may have been paused. The driver
    tells the broker which trials have ended.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.broker = ray.get_actor(BROKER_NAME)
        self.configuration = Configuration.from_json(config["configuration"])
        self.name = self.trial_id
        self.reported_step = 0
        self.last_metrics: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        while True:
            try:
                promise: Any = self.broker.next_report.remote(
                    self.name, self.configuration, self.reported_step, timeouts.REPORT_WAIT_SECONDS
                )
                news: Any = ray.get(promise)  # Report | State | None
            except ActorUnavailableError:  # it restarts, and is told again what this trial wants
                time.sleep(0.5)
                continue
            except ActorDiedError:  # for good: the driver gives the study up
                news = "failed"
            if isinstance(news, Report):
                self.reported_step = news.step
                self.last_metrics = self._metrics(news.step, news.scores)
                return {**self.last_metrics, "state": "training"}
            if news is not None:
                return {**self._final_metrics(news), "state": news, "done": True}

    def _metrics(self, step: int, scores: Mapping[str, float]) -> dict[str, Any]:
        """A task may have its answers graded at the end only: on the way it is worth the floor."""
        task = self.configuration.task
        return {
            "step": step,
            "evaluation": evaluation_index(self.configuration, step),
            "score": scores.get(task.metric, task.floor),
            "loss": scores["loss"],
        }

    def _final_metrics(self, state: str) -> dict[str, Any]:
        """The last result again. A diverged lane gets that of the evaluation that it did not reach, and it is
        the worst: the others are measured against it too. What failed or was stopped before it had a result
        has the worst at its start, where nobody looks; its record says that it has no score."""
        step = self.reported_step
        if state == "diverged":
            step = next(
                (each for each in lane_evaluation_steps(self.configuration) if each > self.reported_step),
                self.reported_step,
            )
        elif self.last_metrics:
            return self.last_metrics
        task = self.configuration.task
        return self._metrics(step, {"loss": WORST_LOSS, task.metric: task.floor})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """On a pause: what Tune has seen. The lane's own checkpoints hold the rest."""
        return {"reported_step": self.reported_step, "last_metrics": self.last_metrics}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.reported_step, self.last_metrics = checkpoint["reported_step"], checkpoint["last_metrics"]
