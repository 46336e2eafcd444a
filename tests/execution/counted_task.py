"""The letters task with optimizer steps that are counted and that a test can slow down.

`steps.py` is the test's side. Both use the folder that the environment variable STEPS_FOLDER names: each
process that trains appends the time of each step to a file of its own there, so the steps of a killed process
count, too. Lanes are evaluated more often than in the letters task, so they have more checkpoints.
"""

from __future__ import annotations

import importlib
import os
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.tasks.letters import Letters

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
    """Count the steps of this process with a hook of torch, which also waits for `waits(folder)` seconds."""
    mine = folder / str(os.getpid())

    def step(optimizer: Any, args: Any, kwargs: Any) -> None:
        with mine.open("ab", buffering=0) as file:
            file.write(MOMENT.pack(time.time()))
        began = time.monotonic()
        while time.monotonic() - began < waits(folder):
            time.sleep(0.02)

    register_optimizer_step_post_hook(step)


# Only in a Ray worker: a test may also train with this task in its own process, where steps do not count.
if "STEPS_FOLDER" in os.environ and "RAY_RAYLET_PID" in os.environ:
    sys.path.append(str(Path(__file__).parent))
    # A hook of the test, and no content of the task: an import statement would be refused.
    importlib.import_module("prompt_checkpoints").save_promptly()
    count(Path(os.environ["STEPS_FOLDER"]))
