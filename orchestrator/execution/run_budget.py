"""When a study ends before all is trained: by a limit, or because somebody asked. And what it has cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

INTERRUPTED = "Ctrl-C"


@dataclass
class RunBudget:
    """Asked at every look of the driver at its trainers. Hours are those of this run."""

    max_hours: float | None = None
    max_gpu_hours: float | None = None
    started_at: float = field(default_factory=time.monotonic)
    """On the clock of `look`, in seconds."""
    gpus_per_trainer: float = 0.0
    """Of a trainer, all its workers together."""
    used_gpu_hours: float = 0.0
    """What the trainers have held so far, from their first word to their last."""
    stop_reason: str = ""
    """Why the study ends now: the limit as it was typed, or INTERRUPTED; empty while it goes on."""
    interrupted_at: float | None = None
    """When Ctrl-C came."""
    _last_update: float | None = None
    _live_trainers: int = 0

    def set_gpus_per_trainer(self, gpus_per_trainer: float) -> None:
        """GPUs that each trainer of this study holds. Raises BadInput when a limit on them means nothing."""
        if self.max_gpu_hours is not None and not gpus_per_trainer:
            raise UsageError(
                f"--max-gpu-hours {self.max_gpu_hours:g}: this study's trainers hold no GPU; take --max-hours."
            )
        self.gpus_per_trainer = gpus_per_trainer

    @property
    def is_interrupted(self) -> bool:
        """Somebody waits for the end."""
        return self.interrupted_at is not None

    @property
    def save_timeout(self) -> float:
        """What trainers get to save their lanes."""
        return timeouts.INTERRUPT_SAVE_SECONDS if self.is_interrupted else timeouts.SAVE_SECONDS

    def interrupt_seconds_left(self) -> float:
        """Of what Ctrl-C is promised; endless without one."""
        if self.interrupted_at is None:
            return math.inf
        return timeouts.INTERRUPT_DEADLINE_SECONDS - (time.monotonic() - self.interrupted_at)

    def request_stop(self, reason: str = INTERRUPTED) -> None:
        """End it at the next look."""
        if reason == INTERRUPTED:
            self.stop_reason, self.interrupted_at = reason, time.monotonic()
        self.stop_reason = self.stop_reason or reason

    def update(self, live_trainers: int, now: float) -> str:
        """`trainers` are there at `now`: counts what they hold, and returns why the study ends, if it does. A
        trainer that came since the last look counts from now on, one that has gone until now."""
        if self._last_update is not None:
            self.used_gpu_hours += (
                self.gpus_per_trainer * self._live_trainers * (now - self._last_update) / 3600
            )
        self._last_update, self._live_trainers = now, live_trainers
        if self.max_hours is not None and now - self.started_at >= self.max_hours * 3600:
            self.request_stop(f"--max-hours {self.max_hours:g}")
        if self.max_gpu_hours is not None and self.used_gpu_hours >= self.max_gpu_hours:
            self.request_stop(f"--max-gpu-hours {self.max_gpu_hours:g}")
        return self.stop_reason

    def format_usage(self) -> str:
        """For people; empty for a study without GPUs."""
        return f"{self.used_gpu_hours:.3g} GPU hours" if self.gpus_per_trainer else ""
