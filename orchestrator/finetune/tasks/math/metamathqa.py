"""MetaMathQA (Yu et al. 2023, 2309.12284) to GSM8K: the survey's mathematics.

395,000 questions with worked answers, made from the training questions of GSM8K and MATH in four ways. The
survey trains on 100,000; so does this, on the first of the hub's order (as PiSSA's scripts do) that are not
held out. Test: GSM8K's 1,319 questions.

Validation. All rows that were made from one original question are held out together, one twelfth of the
questions: a rephrased question is no new one. Of the held out the rows of type GSM_AnsAug are asked, one a
question: they are GSM8K's own training questions in their own words, which is what the test asks. Rephrased
ones are a model's words, the backward ones (SV, FOBAR) ask for an x that GSM8K never asks for, and MATH is
another benchmark. About 620 of GSM8K's 7,473 training questions are held out; 500 are used, so the sampling
error of a validation score near 60 % is 2.2 points. Both sets are graded by one rule.

Prompt: MetaMath's of `eval_gsm8k.py`, in training too, so that a lane is asked as it was taught. (MetaMath
trains without "Let's think step by step."; which of the two the survey takes is not known.) Greedy, at most
512 new tokens, with MetaMath's stops, all from that file. The final number of an answer is compared with
the one behind "####" by math-verify (`grading.math`). MetaMath's own checker reads only what follows "The
answer is: " and rounds it.

Sizes are for a small model (Qwen3-0.6B), after "Learning Rate Matters" (2602.04998), whose length of 512
tokens this takes; the survey's is 1,024 with an 8B model. One pass over 100,000 rows in batches of 64 is
1,562 steps. Warm-up and decay are those of the survey's scripts; its cosine ends at a tenth of the rate,
ours at 0. Rates: the survey's eight, and three above by half decades: HiRA was best at the survey's last
rate (1e-3), so its best was not bracketed, and where it was, on small tasks, it lay a decade above LoRA's.
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

# Commits: main on 2026-08-11, as the cards of a public survey of data sets name them.
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
"""What GSM8K's solutions have between the words for a calculator, and MetaMathQA's have not."""


class MetaMathQA(Task):
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
    truth = None if split == "train" else solution.rpartition("The answer is:")[2].strip()
    return Example(prompt, f" {solution}", reference=truth)
