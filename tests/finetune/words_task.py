"""A task in a user's file: prompts and answers of several lengths, answers to be generated.

The answer is `a`, or `b c d` when the last letter before `=` is one of a few; most answers are `a`, so that a
lane that has learnt little is right on some items and wrong on others.
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
