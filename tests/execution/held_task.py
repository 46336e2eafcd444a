"""The letters task with a trainer that is held in the middle of a study.

A trainer is held after an optimizer step, so that a test has all the time that it needs to inspect or kill
the study. The trainer then creates the file `held` beside this file, and continues when the file `released`
appears. Only the first trainer that gets this far is held; a trainer that takes over after a kill is not.
`study.hold` copies this file and `prompt_checkpoints.py` into a folder and writes the settings beside them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.tasks.letters import Letters

HERE = Path(__file__).parent
HELD, RELEASED = HERE / "held", HERE / "released"


class HeldLetters(Letters):
    defaults = replace(Letters.defaults, validation_size=50, test_size=50)

    def pretrain_recipe(self) -> str:
        return ""  # this task uses the base model of the letters task


def hold(records: Path, count: int, step: int) -> None:
    """Hold this process after step `step` of a lane or later, once the store has `count` records."""
    taken: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # each lane has an optimizer of its own

    def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        taken[optimizer] = taken.get(optimizer, 0) + 1
        if HELD.exists() or taken[optimizer] < step or len(list(records.glob("*/*.json"))) < count:
            return
        HELD.touch()
        while not RELEASED.exists():
            time.sleep(0.05)

    register_optimizer_step_post_hook(look)


# Only in a Ray worker: a test also loads the task, to plan with it.
if "RAY_RAYLET_PID" in os.environ:
    sys.path.append(str(HERE))
    # A hook of the test, and no content of the task: an import statement would be refused.
    importlib.import_module("prompt_checkpoints").save_promptly()
    _where = json.loads((HERE / "hold.json").read_text())
    hold(Path(_where["records"]), _where["count"], _where["step"])
