"""A task file as a user would write it, with prompts and generated answers of several lengths.

The answer is `b c d` if the last letter before `=` is a, b or c, else `a`. Most answers are `a`, so a lane
that has learned little is right on some items and wrong on others.
"""

from __future__ import annotations

import random

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults


class Words(Task):
    title = "letters to words"
    floor = 0.0
    default_model = "letters-base"
    output = "generation"
    max_new_tokens = 5
    defaults = TaskDefaults(
        train_size=64,
        validation_size=24,
        test_size=24,
        steps=20,
        batch_size=8,
        max_length=32,
        evaluations=2,
        learning_rates=(1e-2,),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        source = random.Random(f"words/{split}")
        found = []
        for _ in range(count):
            letters = [source.choice("abcdefgh") for _ in range(source.randint(1, 12))]
            found.append(Example(f"unk {' '.join(letters)} =", "b c d" if letters[-1] in "abc" else "a"))
        return found
