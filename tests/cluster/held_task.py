"""A small version of the letters task, for studies that must not end before the test allows it.

A lane trains to its first checkpoint and then waits for the file `go` beside this file. While a file
`slow-HOST` exists there, lanes on that host do not wait but take slow steps, too few to end during any test.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.local.letters import Letters

STEPS, EVALUATIONS = 300, 15
SLOW_SECONDS = 2.0
HERE = Path(__file__).parent


class HeldLetters(Letters):
    defaults = replace(
        Letters.defaults,
        steps=STEPS,
        evaluations=EVALUATIONS,
        train_size=500,
        validation_size=50,
        test_size=50,
        batch_size=8,
    )

    def pretrain_recipe(self) -> str:
        return ""  # the test provides the model


def hold(optimizer: Any, args: Any, kwargs: Any) -> None:
    taken = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    if taken < STEPS // EVALUATIONS:
        return
    while not (HERE / "go").exists():
        if (HERE / f"slow-{os.uname().nodename}").exists():
            time.sleep(SLOW_SECONDS)
            return
        time.sleep(0.1)


sys.path.append(str(HERE))
# A hook of the test, and no content of the task: an import statement would be refused.
importlib.import_module("prompt_checkpoints").save_promptly()
register_optimizer_step_pre_hook(hold)
