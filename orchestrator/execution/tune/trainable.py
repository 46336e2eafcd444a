"""Tune's class of a trial. Tune requires it in the driver; trial processes use it under Hyperband only."""

from __future__ import annotations

from typing import Any

from ray import tune

from orchestrator.execution.tune.trial import LaneClient


class LaneTrainable(LaneClient, tune.Trainable):
    """Trainable that can be paused: Hyperband pauses trials, and Tune then saves and restores them.

    Under the other schedulers, `LaneTrial` takes its place in the processes of trials.
    """

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
