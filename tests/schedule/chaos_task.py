"""The letters task for the chaos script: scores are due more often, so that a lane has more checkpoints, and
every optimizer step is noted in a way that outlives a kill -9.

Whoever sets CHAOS_STEPS to a folder finds there one file a process: the times of its steps, float64 seconds
since the epoch.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.tasks.letters import Letters


class OftenScoredLetters(Letters):
    defaults = replace(Letters.defaults, evaluations=10, validation_size=50, test_size=50)

    def pretrain_recipe(self) -> str:
        return ""  # it trains on the letters task's base and has none of its own


def note_steps(folder: Path) -> None:
    """By torch's own hook, from outside of the loop: what is written is in the file whatever happens to the
    process afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def taken(optimizer: Any, args: Any, kwargs: Any) -> None:
        os.write(file, struct.pack("d", time.time()))

    register_optimizer_step_post_hook(taken)


if "CHAOS_STEPS" in os.environ:
    note_steps(Path(os.environ["CHAOS_STEPS"]))
