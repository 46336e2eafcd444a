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

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, Task, hash_split, require_count
from orchestrator.finetune.tasks.instruction_task import (
    ALPACA_PROMPT,
    cached_by_data_folder,
    instruction_defaults,
    read_rows,
)

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


class MetaMathQA(Task):
    """Solving grade-school math problems: MetaMathQA to GSM8K."""

    name = "metamathqa"
    title = "MetaMathQA to GSM8K"
    metric = "exact_match"
    floor = 0.0
    default_model = "Qwen/Qwen3-0.6B-Base"
    output = "generation"
    max_new_tokens = 512
    grade_at = "last_evaluation"
    stop = ("Question", "USER", "ASSISTANT", "Instruction", "Response")
    defaults = instruction_defaults(100_000, 500, 1319, 1562, weight_decay=5e-4)

    def examples(self, split: Split, count: int) -> list[Example]:
        return _examples(split, count)

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import math

        return math.grade(answer, example.reference or "")


@cached_by_data_folder
def _examples(split: Split, count: int) -> list[Example]:
    found: list[Example] = []
    if split == "test":
        for row in read_rows(TEST, "metamathqa"):
            solution, _, number = row["answer"].rpartition("####")
            solution = CALCULATOR_ANNOTATION.sub("", solution).strip()
            found.append(_example(row["question"], f"{solution}\nThe answer is: {number.strip()}", split))
        return require_count(found, count, "metamathqa", split)
    seen: set[str] = set()
    for row in read_rows(TRAIN, "metamathqa"):
        key = row["original_question"].strip()
        if hash_split(key, ("validation",), HASH_BUCKETS) != split:
            continue
        if split == "validation" and (row["type"] != VALIDATION_TYPE or key in seen):
            continue
        seen.add(key)
        found.append(_example(row["query"], row["response"], split))
        if len(found) == count:
            break
    return require_count(found, count, "metamathqa", split)


def _example(question: str, solution: str, split: Split) -> Example:
    prompt = ALPACA_PROMPT.format(instruction=question) + " Let's think step by step."
    reference = None if split == "train" else solution.rpartition("The answer is:")[2].strip()
    return Example(prompt, f" {solution}", reference=reference)
