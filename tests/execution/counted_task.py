"""The letters task whose optimizer steps are counted, and can be slowed down by a test.

`steps.py` is the test's side; the two meet in the folder that the variable STEPS_FOLDER names. A process
that trains appends the time of each step there to a file of its own, so that the steps of a killed process
count, too. Scores are due more often than those of the letters task: a lane has more checkpoints.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.tasks.local.letters import Letters

MOMENT = struct.Struct("d")  # seconds since the epoch
SLOW = "slow"


class CountedLetters(Letters):
    defaults = replace(Letters.defaults, evaluations=10, validation_size=50, test_size=50)

    def pretrain_recipe(self) -> str:
        return ""  # this task uses the base model of the letters task


def taken(folder: Path) -> int:
    """Return the number of steps that all processes together have taken."""
    return sum(file.stat().st_size for file in folder.glob("[0-9]*")) // MOMENT.size


def waits(folder: Path) -> float:
    """Return the seconds that a process waits after a step: 0 unless the test slows the steps down."""
    try:
        after, seconds = (folder / SLOW).read_text().split()
    except FileNotFoundError:
        return 0.0
    return float(seconds) if taken(folder) >= int(after) else 0.0


def count(folder: Path) -> None:
    """Count the steps of this process with torch's hook, and after each step wait as `waits` says."""
    mine = folder / str(os.getpid())

    def step(optimizer: Any, args: Any, kwargs: Any) -> None:
        with mine.open("ab", buffering=0) as file:
            file.write(MOMENT.pack(time.time()))
        began = time.monotonic()
        while time.monotonic() - began < waits(folder):
            time.sleep(0.02)

    register_optimizer_step_post_hook(step)


# In a worker of Ray's only: a test may train with this task in its own process, and such steps do not count.
if "STEPS_FOLDER" in os.environ and "RAY_RAYLET_PID" in os.environ:
    count(Path(os.environ["STEPS_FOLDER"]))
