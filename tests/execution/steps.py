"""The optimizer steps of the processes that train `counted_task.py`, seen and slowed down by a test."""

from __future__ import annotations

import math
import os
import struct
import uuid
from pathlib import Path

TASK = Path(__file__).with_name("counted_task.py")
FOLDER = "STEPS_FOLDER"
"""The environment variable that names the folder. Ray hands its own to its workers."""
MOMENT = struct.Struct("d")  # what counted_task.py writes for each step
SLOW_SECONDS = 2.0


class Steps:
    """The steps that were taken by all processes whose STEPS_FOLDER is `folder`.

    A study is slowed down, rather than held, where its lanes have to hear after each step what they are told.
    It needs so many steps that it would take minutes to its end, which no test waits for.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.limit = math.inf

    def files(self) -> list[Path]:
        """Return a file for each process that has taken a step."""
        return [file for file in self.folder.glob("[0-9]*") if file.stat().st_size >= MOMENT.size]

    def taken(self) -> int:
        """Return how many steps all processes together have taken."""
        return sum(file.stat().st_size // MOMENT.size for file in self.files())

    def firsts(self) -> list[float]:
        """Return when each process took its first step, in seconds since the epoch."""
        return [MOMENT.unpack(file.read_bytes()[: MOMENT.size])[0] for file in self.files()]

    def slow_after(self, count: int, seconds: float = SLOW_SECONDS) -> None:
        """Make every step take `seconds` once `count` steps were taken by all processes together."""
        self.limit = count
        draft = self.folder / f".{uuid.uuid4().hex}"
        draft.write_text(f"{count} {seconds}")
        os.replace(draft, self.folder / "slow")

    def run_free(self) -> None:
        """Slow nothing down any more."""
        self.limit = math.inf
        (self.folder / "slow").unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all steps, and slow nothing down."""
        self.run_free()
        for file in self.folder.iterdir():
            file.unlink()
