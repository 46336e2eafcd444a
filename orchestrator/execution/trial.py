"""Tune's trial of one configuration, as a thin client of the broker.

This module imports neither torch nor Ray Tune, which would take most of the CPU time and memory of a trial's
process; see `private_ray.light_trial_actors`. A trial reserves memory instead of a CPU, so that trials never
take the cores of trainers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from orchestrator.execution.broker import BROKER_NAME
from orchestrator.execution.schedulers import lane_evaluation_steps
from orchestrator.finetune.engine.lane_source import Report
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

TRIAL_MEMORY_BYTES = 150 * 2**20
"""Memory of a trial's process; 86 MiB were measured on Linux x86-64."""
WORST_LOSS = 1e9
"""The loss of a diverged lane. It is finite, because NaN and infinity break Ray's schedulers."""


class LaneTrial:
    """The trial of a configuration, an actor with the methods of `tune.Trainable` that Tune calls.

    Each result but the last is the lane's next report. The last one has `done` and the state in which the
    lane ended. The searcher tells the broker that a trial has ended, because Tune may kill a trial's process
    or reuse it for another trial.

    Args:
        config: The trial's configuration under "configuration", and the trial's id under "__trial_info__".
        **unused: Where and how a trial would write files.
    """

    def __init__(self, config: dict[str, Any], **unused: object) -> None:
        self.broker = ray.get_actor(BROKER_NAME)
        self.reset(config)

    def reset(self, new_config: dict[str, Any], **unused: object) -> bool:
        """Switch to another trial, so that Tune can reuse the process."""
        self.trial_id: str = new_config["__trial_info__"]
        self.configuration: Configuration = new_config["configuration"]
        self.reported_step, self.num_results = 0, 0
        self.last_metrics: dict[str, Any] = {}
        return True

    def train(self) -> dict[str, Any]:
        """Return the next result, with the entries that Tune reads from every result."""
        self.num_results += 1
        result = {"done": False, **self.step(), "training_iteration": self.num_results}
        return {**result, **self.get_auto_filled_metrics()}

    def get_auto_filled_metrics(self, debug_metrics_only: bool = True) -> dict[str, Any]:
        """Return the trial's id, and the process that runs it."""
        return {"trial_id": self.trial_id, "pid": os.getpid(), "node_ip": ray.util.get_node_ip_address()}

    def stop(self) -> None:
        """Do nothing: a trial's process has nothing to release."""

    def step(self) -> dict[str, Any]:
        """Wait for the lane's next report, or its end, and return the trial's own entries of a result."""
        while True:
            try:
                reference: Any = self.broker.next_report.remote(
                    self.trial_id, self.configuration, self.reported_step, timeouts.REPORT_WAIT_SECONDS
                )
                news: Any = ray.get(reference)  # Report | RecordState | None
            except RayActorError:  # a network fault, or the broker is lost and the driver ends the study
                time.sleep(1.0)
                continue
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
