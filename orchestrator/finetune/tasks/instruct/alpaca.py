"""Alpaca to IFEval, as "Learning Rate Matters" (2602.04998) has it: instructions, and whether an answer does
what can be checked of them.

Taught: yahma/alpaca-cleaned (51,760 rows, Stanford Alpaca mended by hand) in Stanford Alpaca's two prompts,
with an input and without. Asked: IFEval (Zhou et al. 2023, 2311.07911) in the prompt without. Score: the
share of prompts all of whose instructions are followed, strictly, by lm-eval's checker
(`grading.instructions`), which needs `pip install 'lora-orchestrator[ifeval]'`; "Learning Rate Matters" gives
the mean of strict measures. Greedy, at most 1,280 new tokens, as lm-eval's own task.

IFEval has 541 prompts and nothing like it to choose by, so by their own hash a quarter are validation and the
rest, about 405, are test: not quite the published set, but no choice has seen a test prompt. The validation
loss is that of held-out Alpaca answers (IFEval has no reference answers), in turns with the prompts, as in
`codefeedback.py`; a test loss there is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain, islice
from typing import Any

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, Task, hash_split, require_count
from orchestrator.finetune.tasks.instruction_task import (
    ALPACA_PROMPT,
    cached_by_data_folder,
    instruction_defaults,
    read_rows,
)

TRAIN = Table("yahma/alpaca-cleaned", "train", dict.fromkeys(("instruction", "input", "output"), str))
IFEVAL = Table("google/IFEval", "train", {"prompt": str, "instruction_id_list": object, "kwargs": object})
HASH_BUCKETS = 50  # about 1,000 rows
PROMPT_HASH_BUCKETS = 4
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)


class Alpaca(Task):
    name = "alpaca"
    title = "Alpaca to IFEval"
    metric = "prompt_strict"
    floor = 0.0
    default_model = "Qwen/Qwen3-0.6B-Base"
    output = "generation"
    max_new_tokens = 1280
    grade_at = "last_evaluation"
    defaults = instruction_defaults(50_000, 200, 370, 781)

    def examples(self, split: Split, count: int) -> list[Example]:
        return _examples(split, count)

    def check_can_grade(self) -> None:
        from orchestrator.finetune.grading import instructions

        instructions.load_checker()

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import instructions

        return instructions.grade(json.loads(example.reference or "{}"), answer)


@cached_by_data_folder
def _examples(split: Split, count: int) -> list[Example]:
    training_examples = (
        _training_example(row)
        for row in read_rows(TRAIN, "alpaca")
        if hash_split(row["instruction"] + row["input"], ("validation",), HASH_BUCKETS) == split
    )
    if split == "train":
        return require_count(list(islice(training_examples, count)), count, "alpaca", split)
    ifeval_examples = (
        _ifeval_example(row)
        for row in read_rows(IFEVAL, "alpaca")
        # What is not validation is test: nobody trains on these.
        if (hash_split(row["prompt"], ("validation",), PROMPT_HASH_BUCKETS) == "validation")
        == (split == "validation")
    )
    if split == "test":
        return require_count(list(islice(ifeval_examples, count)), count, "alpaca", split)
    loss_examples = (Example(e.prompt, e.answer, counts_in="loss") for e in training_examples)
    pairs = zip(loss_examples, ifeval_examples, range((count + 1) // 2), strict=False)
    return require_count(list(chain.from_iterable((a, b) for a, b, _ in pairs)), count, "alpaca", split)


def _training_example(row: Mapping[str, Any]) -> Example:
    if row["input"]:
        prompt = PROMPT_WITH_INPUT.format(instruction=row["instruction"], input=row["input"])
    else:
        prompt = ALPACA_PROMPT.format(instruction=row["instruction"]) + "\n"
    return Example(prompt, row["output"])


def _ifeval_example(row: Mapping[str, Any]) -> Example:
    # What an instruction does not take is null where the table is Parquet.
    kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
    truth = {
        "prompt": row["prompt"],
        "instruction_id_list": list(row["instruction_id_list"]),
        "kwargs": kwargs,
    }
    return Example(
        ALPACA_PROMPT.format(instruction=row["prompt"]) + "\n",
        "",
        reference=json.dumps(truth),
        counts_in="metric",
    )
