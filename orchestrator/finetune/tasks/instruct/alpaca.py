"""Training on Alpaca, evaluation on IFEval: following instructions that can be checked.

"Learning Rate Matters" (2602.04998) has the same pair of datasets.

Training: yahma/alpaca-cleaned (51,760 rows, Stanford Alpaca corrected by hand) in Stanford Alpaca's two
prompts, with and without an input. Evaluation: IFEval (Zhou et al. 2023, 2311.07911) in the prompt without
input. The score is the share of prompts all of whose instructions are strictly followed, according to
lm-eval's checker (`grading/text_answers.py`), which needs `pip install -e '.[ifeval]'`;
"Learning Rate Matters" reports the mean of the strict measures. Decoding is greedy with at most 1,280 new
tokens, as in lm-eval's own task.

Splits: IFEval has 541 prompts, and there is no similar dataset for validation. Therefore a quarter of the
prompts, chosen by their hash, are the validation split, and the other 405 or so are the test split. This is
not quite the published set, but no choice depends on test prompts. IFEval has no reference answers, so the
validation loss is computed on held-out Alpaca answers, which alternate with the prompts as in
`codefeedback.py`; there is no test loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.instruction_task import ALPACA_PROMPT, InstructionTask, instruction_defaults

TRAIN = Table("yahma/alpaca-cleaned", "train", dict.fromkeys(("instruction", "input", "output"), str))
IFEVAL = Table("google/IFEval", "train", {"prompt": str, "instruction_id_list": object, "kwargs": object})
HASH_BUCKETS = 50  # one of them, about 1,000 rows, is held out
PROMPT_HASH_BUCKETS = 4
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)


class Alpaca(InstructionTask):
    """Following instructions: Alpaca to IFEval."""

    name = "alpaca"
    title = "Alpaca to IFEval"
    metric = "prompt_strict"
    max_new_tokens = 1280
    defaults = instruction_defaults(50_000, 200, 370, 781)

    def read_examples(self, split: Split) -> Iterable[Example]:
        training_examples = (
            _training_example(row)
            for row in self.read_rows(TRAIN)
            if hash_split(row["instruction"] + row["input"], ("validation",), HASH_BUCKETS) == split
        )
        if split == "train":
            return training_examples
        ifeval_examples = (
            _ifeval_example(row)
            for row in self.read_rows(IFEVAL)
            # All prompts that are not in the validation split are test prompts: none are trained on.
            if (hash_split(row["prompt"], ("validation",), PROMPT_HASH_BUCKETS) == "validation")
            == (split == "validation")
        )
        if split == "test":
            return ifeval_examples
        loss_examples = (replace(example, counts_in="loss") for example in training_examples)
        return chain.from_iterable(zip(loss_examples, ifeval_examples, strict=False))

    def check_can_grade(self) -> None:
        from orchestrator.finetune.grading import text_answers

        text_answers.load_checker()

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import text_answers

        return text_answers.grade_instructions(json.loads(example.reference or "{}"), answer)


def _training_example(row: Mapping[str, Any]) -> Example:
    if row["input"]:
        prompt = PROMPT_WITH_INPUT.format(instruction=row["instruction"], input=row["input"])
    else:
        prompt = ALPACA_PROMPT.format(instruction=row["instruction"]) + "\n"
    return Example(prompt, row["output"])


def _ifeval_example(row: Mapping[str, Any]) -> Example:
    # In Parquet the options that an instruction does not have are null.
    kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
    reference = json.dumps({**row, "instruction_id_list": list(row["instruction_id_list"]), "kwargs": kwargs})
    prompt = ALPACA_PROMPT.format(instruction=row["prompt"]) + "\n"
    return Example(prompt, "", reference=reference, counts_in="metric")
