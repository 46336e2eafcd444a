"""A user's task whose lanes wait during training, so that a test can inspect or disturb a running study.

Three environment variables control the task. Before the step with the number WAITS_BEFORE, a lane waits until
the file WAITS_FOR exists. A lane with a learning rate above 1e-2 then fails. Its error quotes the values of
the environment variables that QUOTES names.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults


class Reversal(Task):
    """The answer to `unk a b c d e =` is the letters in reverse order."""

    title = "letters in reverse"
    floor = 0.0
    default_model = "letters-base"
    output = "teacher_forced"
    max_new_tokens = 6
    defaults = TaskDefaults(
        train_size=400,
        validation_size=50,
        test_size=50,
        steps=12,
        batch_size=8,
        max_length=13,
        evaluations=2,
        learning_rates=(1e-3, 1e-2),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        first = {"train": "abcdefgh", "validation": "ijkl", "test": "mnop"}[split]
        draw = random.Random(split)
        words: dict[str, None] = {}
        while len(words) < count:
            words[draw.choice(first) + "".join(draw.choices("abcdefghijklmnop", k=4))] = None
        return [Example(f"unk {' '.join(word)} =", " ".join(reversed(word))) for word in words]


taken: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # steps of each lane, by its optimizer


def wait(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    taken[optimizer] = taken.get(optimizer, 0) + 1
    if taken[optimizer] < int(os.environ["WAITS_BEFORE"]):
        return
    while not Path(os.environ["WAITS_FOR"]).exists():
        time.sleep(0.05)
    if optimizer.param_groups[0]["lr"] > 1e-2:
        quoted = " ".join(f"{name}={os.environ[name]}" for name in os.environ["QUOTES"].split())
        raise ConnectionError(f"cannot reach the server with {quoted}")


if "WAITS_FOR" in os.environ:
    register_optimizer_step_pre_hook(wait)
