"""Training on MetaMathQA (Yu et al. 2023, 2309.12284), evaluation on GSM8K: the survey's math task.

Training: MetaMathQA has 395,000 questions with worked answers, made from the training questions of GSM8K and
MATH in four ways. Like the survey the task uses 100,000 of them, namely the first ones on the hub (as in
PiSSA's scripts) that are not held out. Test: GSM8K's 1,319 questions.

Validation: one twelfth of the original questions is held out with all rows made from them, since a
rephrased question is not a new one. The validation split has one held-out row of type GSM_AnsAug per
question: these are GSM8K's training questions in their original words, like the test questions. Rephrased
questions were written by a model, backward questions (SV, FOBAR) ask for an x, which GSM8K never does, and
MATH is another benchmark. About 620 of GSM8K's 7,473 training questions are held out and 500 are used, so a
validation score near 60 % has a standard error of 2.2 points. Both splits are graded in the same way.

Prompt: that of MetaMath's `eval_gsm8k.py`, in training as well, so that training and evaluation agree.
(MetaMath trains without "Let's think step by step."; it is not known what the survey does.) Decoding is
greedy with at most 512 new tokens and MetaMath's stops, all from that file. math-verify compares the final
number of an answer with the number after "####" (`grading/math.py`). MetaMath's own checker reads only what
follows "The answer is: " and rounds it.

Sizes are for a small model (Qwen3-0.6B), after "Learning Rate Matters" (2602.04998), from which the length
of 512 tokens is taken; the survey has 1,024 with an 8B model. One pass over 100,000 rows in batches of 64
is 1,562 steps. Warm-up and weight decay are those of the survey's scripts. The survey's cosine schedule
ends at a tenth of the learning rate, this one at 0. The learning rates are the survey's eight and three
higher ones, each half a decade above the one before: HiRA was best at the survey's highest rate (1e-3), so
its optimum may be above it. On small tasks, where the optimum was bracketed, it was a decade above LoRA's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.instruction_task import ALPACA_PROMPT, InstructionTask, instruction_defaults

# Commits of main on 2026-08-11, taken from the cards of a public survey of datasets.
TRAIN = Table(
    "meta-math/MetaMathQA",
    "train",
    dict.fromkeys(("type", "query", "original_question", "response"), str),
    revision="aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18",
)
TEST = Table(
    "openai/gsm8k",
    "test",
    {"question": str, "answer": str},
    subset="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
)
VALIDATION_TYPE = "GSM_AnsAug"
HASH_BUCKETS = 12
CALCULATOR_ANNOTATION = re.compile("<<.*?>>")
"""Annotations for a calculator in GSM8K's solutions, which MetaMathQA does not have."""


class MetaMathQA(InstructionTask):
    """Solving grade-school math problems: MetaMathQA to GSM8K."""

    name = "metamathqa"
    title = "MetaMathQA to GSM8K"
    max_new_tokens = 512
    stop = ("Question", "USER", "ASSISTANT", "Instruction", "Response")
    defaults = instruction_defaults(100_000, 500, 1319, 1562, weight_decay=5e-4)

    def read_examples(self, split: Split) -> Iterator[Example]:
        if split == "test":
            for row in self.read_rows(TEST):
                solution, _, number = row["answer"].rpartition("####")
                solution = CALCULATOR_ANNOTATION.sub("", solution).strip()
                yield _example(row["question"], f"{solution}\nThe answer is: {number.strip()}", split)
            return
        seen: set[str] = set()
        for row in self.read_rows(TRAIN):
            key = row["original_question"].strip()
            if hash_split(key, ("validation",), HASH_BUCKETS) != split:
                continue
            if split == "train" or (row["type"] == VALIDATION_TYPE and key not in seen):
                seen.add(key)
                yield _example(row["query"], row["response"], split)

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import math

        return math.grade(answer, example.reference or "")


def _example(question: str, solution: str, split: Split) -> Example:
    prompt = ALPACA_PROMPT.format(instruction=question) + " Let's think step by step."
    reference = None if split == "train" else solution.rpartition("The answer is:")[2].strip()
    return Example(prompt, f" {solution}", reference=reference)
