"""The limits of one run of a study, Ctrl-C, and the GPU hours that the run has used."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

INTERRUPTED = "Ctrl-C"
"""The stop reason after Ctrl-C or SIGTERM."""


@dataclass
class RunBudget:
    """The time limits of a run, and the reason to stop it.

    The driver calls `update` at every poll. Earlier runs of the same study do not count.
    """

    max_hours: float | None = None
    max_gpu_hours: float | None = None
    started_at: float = field(default_factory=time.monotonic)
    """Start of the run in seconds, on the clock of `update`."""
    gpus_per_trainer: float = 0.0
    """GPUs that all workers of a trainer reserve together."""
    used_gpu_hours: float = 0.0
    """GPU hours that trainers have reserved so far, from their first to their last call of the broker."""
    stop_reason: str = ""
    """The reason to stop: the limit as the user typed it, or INTERRUPTED; empty while the run continues."""
    interrupted_at: float | None = None
    """Monotonic time of Ctrl-C in seconds; None without Ctrl-C."""
    _last_update: float | None = None
    _live_trainers: int = 0

    def set_gpus_per_trainer(self, gpus_per_trainer: float) -> None:
        """Set the number of GPUs that each trainer reserves.

        Raises:
            UsageError: GPU hours are limited and the trainers reserve no GPU.
        """
        if self.max_gpu_hours is not None and not gpus_per_trainer:
            raise UsageError(
                f"--max-gpu-hours {self.max_gpu_hours:g}: the trainers hold no GPU; take --max-hours."
            )
        self.gpus_per_trainer = gpus_per_trainer

    @property
    def is_interrupted(self) -> bool:
        """True if the user has interrupted the run."""
        return self.interrupted_at is not None

    @property
    def save_timeout(self) -> float:
        """Seconds that trainers get to save their lanes."""
        return timeouts.INTERRUPT_SAVE_SECONDS if self.is_interrupted else timeouts.SAVE_SECONDS

    def interrupt_seconds_left(self) -> float:
        """Return the seconds left until the deadline after Ctrl-C; infinity without Ctrl-C."""
        if self.interrupted_at is None:
            return math.inf
        return timeouts.INTERRUPT_DEADLINE_SECONDS - (time.monotonic() - self.interrupted_at)

    def request_stop(self, reason: str = INTERRUPTED) -> None:
        """Make the next update return a stop reason; Ctrl-C replaces an earlier reason."""
        if reason == INTERRUPTED:
            self.stop_reason, self.interrupted_at = reason, time.monotonic()
        self.stop_reason = self.stop_reason or reason

    def update(self, live_trainers: int, now: float) -> str:
        """Add the GPU hours since the last update, and return the stop reason.

        A trainer that has started since the last update counts from now on. A trainer that has ended since
        then counts until now.

        Args:
            live_trainers: Number of trainers that are alive.
            now: Monotonic time in seconds.
        """
        if self._last_update is not None:
            elapsed = now - self._last_update
            self.used_gpu_hours += self.gpus_per_trainer * self._live_trainers * elapsed / 3600
        self._last_update, self._live_trainers = now, live_trainers
        if self.max_hours is not None and now - self.started_at >= self.max_hours * 3600:
            self.request_stop(f"--max-hours {self.max_hours:g}")
        if self.max_gpu_hours is not None and self.used_gpu_hours >= self.max_gpu_hours:
            self.request_stop(f"--max-gpu-hours {self.max_gpu_hours:g}")
        return self.stop_reason

    def format_usage(self) -> str:
        """Return the GPU hours used, as text; empty for a study without GPUs."""
        return f"{self.used_gpu_hours:.3g} GPU hours" if self.gpus_per_trainer else ""
