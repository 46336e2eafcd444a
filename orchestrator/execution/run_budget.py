"""When a study ends before all is trained: by a limit, or because somebody asked. And what it has cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from orchestrator.util.errors import BadInput

INTERRUPTED = "Ctrl-C"
PROMISED_SECONDS = 10.0  # from Ctrl-C to the end
SAVE_SECONDS = 60.0  # what seats get to save their lanes when a limit ends the study
HASTE_SECONDS = 4.0  # the same after Ctrl-C: a lane in a long evaluation keeps its last checkpoint


@dataclass
class Limits:
    """Asked at every look of the driver at its seats. Hours are those of this run."""

    max_hours: float | None = None
    max_gpu_hours: float | None = None
    began: float = field(default_factory=time.monotonic)
    """On the clock of `look`, in seconds."""
    gpus: float = 0.0
    """Of a seat, all its workers together."""
    gpu_hours: float = 0.0
    """What the seats have held so far, from their first word to their last."""
    reached: str = ""
    """Why the study ends now: the limit as it was typed, or INTERRUPTED; empty while it goes on."""
    interrupted: float | None = None
    """When Ctrl-C came."""
    _looked: float | None = None
    _seats: int = 0

    def hold(self, gpus: float) -> None:
        """GPUs that each seat of this study holds. Raises BadInput when a limit on them means nothing."""
        if self.max_gpu_hours is not None and not gpus:
            raise BadInput(
                f"--max-gpu-hours {self.max_gpu_hours:g}: this study's seats hold no GPU; take --max-hours."
            )
        self.gpus = gpus

    @property
    def hasty(self) -> bool:
        """Somebody waits for the end."""
        return self.interrupted is not None

    @property
    def save_seconds(self) -> float:
        """What seats get to save their lanes."""
        return HASTE_SECONDS if self.hasty else SAVE_SECONDS

    def seconds_left(self) -> float:
        """Of what Ctrl-C is promised; endless without one."""
        if self.interrupted is None:
            return math.inf
        return PROMISED_SECONDS - (time.monotonic() - self.interrupted)

    def ask(self, why: str = INTERRUPTED) -> None:
        """End it at the next look."""
        if why == INTERRUPTED:
            self.reached, self.interrupted = why, time.monotonic()
        self.reached = self.reached or why

    def look(self, seats: int, now: float) -> str:
        """`seats` are there at `now`: counts what they hold, and returns why the study ends, if it does. A
        seat that came since the last look counts from now on, one that has gone until now."""
        if self._looked is not None:
            self.gpu_hours += self.gpus * self._seats * (now - self._looked) / 3600
        self._looked, self._seats = now, seats
        if self.max_hours is not None and now - self.began >= self.max_hours * 3600:
            self.ask(f"--max-hours {self.max_hours:g}")
        if self.max_gpu_hours is not None and self.gpu_hours >= self.max_gpu_hours:
            self.ask(f"--max-gpu-hours {self.max_gpu_hours:g}")
        return self.reached

    def spent(self) -> str:
        """For people; empty for a study without GPUs."""
        return f"{self.gpu_hours:.3g} GPU hours" if self.gpus else ""
