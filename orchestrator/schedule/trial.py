"""Tune's trial: one configuration, a thin client of the broker. It imports no torch and asks for memory,
not CPU, so that trials never take the cores that seats train on."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorUnavailableError

from orchestrator.finetune.source import Report
from orchestrator.schedule.broker import NAME
from orchestrator.study.configuration import Configuration

MEMORY_BYTES = 300 * 2**20  # a trial's process with Ray Tune imported: 190 MiB measured, Linux x86-64

WAIT_SECONDS = 20.0  # of one call; the trial asks again


class Trial(tune.Trainable):
    """`config` holds "configuration" (its JSON). Every `step` waits for the lane's next report; the last
    result has `done` and the state in which the lane ended."""

    def setup(self, config: dict[str, Any]) -> None:
        self.broker = ray.get_actor(NAME)
        self.configuration = Configuration.from_json(config["configuration"])
        self.name = self.trial_id
        self.at = 0
        self.last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        while True:
            try:
                promise: Any = self.broker.next.remote(self.name, self.configuration, self.at, WAIT_SECONDS)
                news: Any = ray.get(promise)  # Report | State | None
            except ActorUnavailableError:  # it restarts, and is told again what this trial wants
                time.sleep(0.5)
                continue
            if isinstance(news, Report):
                return self._result(news)
            if news is not None:
                return self._end(news)

    def _result(self, report: Report) -> dict[str, Any]:
        self.at = report.step
        metric = self.configuration.task.metric
        self.last = {"step": report.step, "score": report.scores[metric], "loss": report.scores["loss"]}
        return {**self.last, "state": "training"}

    def _end(self, state: str) -> dict[str, Any]:
        """A diverged lane is worth the floor: a finite number, since NaN and infinities poison schedulers. So
        is, in Tune's eyes only, a failed one: its record says that it has no score."""
        if state != "finished" or not self.last:
            self.last = {
                "step": self.at,
                "score": self.configuration.task.floor,
                "loss": self.last.get("loss", 1e9),
            }
        return {**self.last, "state": state, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The lane's own checkpoints are the truth; a trial has nothing to add."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See save_checkpoint."""

    def cleanup(self) -> None:
        self.broker.release.remote(self.name)
