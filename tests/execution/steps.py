"""The test's side of `counted_task.py`: counts and slows down the optimizer steps of training processes."""

from __future__ import annotations

import math
import os
import struct
import uuid
from pathlib import Path

TASK = Path(__file__).with_name("counted_task.py")
FOLDER = "STEPS_FOLDER"
"""The environment variable with the folder. Ray passes its own environment on to its workers."""
MOMENT = struct.Struct("d")  # what counted_task.py writes for each step
SLOW_SECONDS = 2.0


class Steps:
    """The steps that were taken by all processes whose STEPS_FOLDER is `folder`.

    A test slows a study down, instead of holding it, if the lanes must receive directives after each step.
    Slowed down, such a study would need minutes for all its steps; no test waits for that.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.limit = math.inf

    def files(self) -> list[Path]:
        """Return the files of the processes that have taken a step, one per process."""
        return [file for file in self.folder.glob("[0-9]*") if file.stat().st_size >= MOMENT.size]

    def taken(self) -> int:
        """Return the number of steps that all processes together have taken."""
        return sum(file.stat().st_size // MOMENT.size for file in self.files())

    def firsts(self) -> list[float]:
        """Return the time of each process's first step, in seconds since the epoch."""
        return [MOMENT.unpack(file.read_bytes()[: MOMENT.size])[0] for file in self.files()]

    def slow_after(self, count: int, seconds: float = SLOW_SECONDS) -> None:
        """Make every step take `seconds` once all processes together have taken `count` steps."""
        self.limit = count
        draft = self.folder / f".{uuid.uuid4().hex}"
        draft.write_text(f"{count} {seconds}")
        os.replace(draft, self.folder / "slow")

    def run_free(self) -> None:
        """Stop slowing steps down."""
        self.limit = math.inf
        (self.folder / "slow").unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all steps, and stop slowing steps down."""
        self.run_free()
        for file in self.folder.iterdir():
            file.unlink()
