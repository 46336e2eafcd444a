"""Tune's trial of one configuration, as a thin client of the broker.

A trial imports no torch. It reserves memory instead of a CPU, so that trials never take the cores of
trainers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorDiedError, ActorUnavailableError

from orchestrator.execution.broker.client import BROKER_NAME
from orchestrator.execution.rungs import evaluation_index, lane_evaluation_steps
from orchestrator.finetune.engine.lane_source import Report
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

TRIAL_MEMORY_BYTES = 300 * 2**20
"""Memory of a trial's process with Ray Tune imported; 190 MiB were measured on Linux x86-64."""
WORST_LOSS = 1e9
"""The loss of a diverged lane. It is finite, because NaN and infinity break Ray's schedulers."""


class LaneTrainable(tune.Trainable):
    """Trainable whose every `step` waits for the lane's next report.

    A step lets the lane continue if the lane was paused after its last report. The last result has `done` and
    the state in which the lane ended. The trainable never releases its lane, because its process may be
    paused or reused for another trial; `BrokerCallback` tells the broker which trials have ended.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the configuration, which `config` has as JSON under "configuration"."""
        self.broker = ray.get_actor(BROKER_NAME)
        self.configuration = Configuration.from_json(config["configuration"])
        self.reported_step = 0
        self.last_metrics: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """Wait for the lane's next report, or its end, and return Tune's result."""
        while True:
            try:
                reference: Any = self.broker.next_report.remote(
                    self.trial_id, self.configuration, self.reported_step, timeouts.REPORT_WAIT_SECONDS
                )
                news: Any = ray.get(reference)  # Report | RecordState | None
            except ActorUnavailableError:  # the broker restarts; the next call submits again
                time.sleep(0.5)
                continue
            except ActorDiedError:  # the broker is lost for good: the driver ends the study
                news = "failed"
            if isinstance(news, Report):
                self.reported_step = news.step
                self.last_metrics = self._metrics(news.step, news.scores)
                return {**self.last_metrics, "state": "training"}
            if news is not None:
                return {**self._final_metrics(news), "state": news, "done": True}

    def _metrics(self, step: int, scores: Mapping[str, float]) -> dict[str, Any]:
        """Return Tune's metrics for a report; the score is the floor if the task grades only at the end."""
        task = self.configuration.task
        return {
            "step": step,
            "evaluation": evaluation_index(self.configuration, step),
            "score": scores.get(task.metric, task.floor),
            "loss": scores["loss"],
        }

    def _final_metrics(self, state: str) -> dict[str, Any]:
        """Return the metrics of the last result.

        They repeat the last report. A diverged lane gets the worst metrics at its next evaluation, which it
        did not reach, because other lanes are compared with it. A lane that failed or was stopped before its
        first report gets the worst metrics at step 0, which no scheduler compares; its record contains no
        score.
        """
        step = self.reported_step
        if state == "diverged":
            step = next((s for s in lane_evaluation_steps(self.configuration) if s > step), step)
        elif self.last_metrics:
            return self.last_metrics
        task = self.configuration.task
        return self._metrics(step, {"loss": WORST_LOSS, task.metric: task.floor})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another configuration, so that Tune can reuse the process."""
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return the last report that Tune has seen, for a pause; the lane has checkpoints of its own."""
        return {"reported_step": self.reported_step, "last_metrics": self.last_metrics}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take what `save_checkpoint` returned."""
        self.reported_step, self.last_metrics = checkpoint["reported_step"], checkpoint["last_metrics"]
