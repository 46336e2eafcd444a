"""Commonsense reasoning in 15,000 questions (LLM-Adapters, Hu et al. 2023, 2304.01933): one training set
for eight evaluation sets, whose accuracies are averaged.

LLM-Adapters' `ft-training_set/commonsense_15k.json` has no home on the hub that could be confirmed; its big
brother of 170,000 has (zwhe99/commonsense_170k, read by many repositories), with the same columns and the
same eight kinds of questions. The 15,000 here are a fixed draw from those: other rows than LLM-Adapters',
of the same kinds and in the same proportions up to chance. That file's order is by kind, so the draw is a
shuffle.

Prompt: LLM-Adapters' own, the indentation of its source included, which is part of it (`generate_prompt` of
`finetune.py` and of its evaluation); the last of the spaces goes to the answer, where tokenizers of byte
pairs have it in any case. A question that ends in its choices and "Answer format: ...", an answer that
reads "the correct answer is ...": both confirmed by outputs that repositories show. What an answer takes is
read from its words (`grading.choice`), nearly as by its `extract_answer`. Its evaluation takes four beams;
this is greedy, as in "Learning Rate Matters" (2602.04998).

Test: the labelled public split of each set, in turns so that each has the same weight: BoolQ (without its
passage, as there), PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge, OpenBookQA. PIQA and SIQA
are read from the hub's own conversion, as `datasets` runs no loading scripts any more. 150 of each, drawn
once for all, by default (LLM-Adapters: all 22,000): sampling error 1.2 points at 0.8. Validation: held-out
training questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, Task, hash_split, require_count
from orchestrator.finetune.tasks.instruction_task import (
    LEARNING_RATES,
    cached_by_data_folder,
    instruction_defaults,
    read_rows,
)

TRAIN = Table("zwhe99/commonsense_170k", "train", dict.fromkeys(("instruction", "output", "answer"), str))
HASH_BUCKETS = 50  # about 3,400 of 170,000
INDENT = " " * 16
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    f"request. \n\n{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n{INDENT}### Response:\n{INDENT[1:]}"
)
PARQUET_REVISION = "refs/convert/parquet"

Row = Mapping[str, Any]


def _boolq(row: Row) -> tuple[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{question}\n\nAnswer format: true/false", "true" if row["answer"] else "false"


def _piqa(row: Row) -> tuple[str, str]:
    question = f"Please choose the correct solution to the question: {row['goal']}"
    choices = f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}"
    return f"{question}\n\n{choices}\n\nAnswer format: solution1/solution2", f"solution{row['label'] + 1}"


def _siqa(row: Row) -> tuple[str, str]:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _format_question(f"{row['context']} {row['question']}", texts), f"answer{row['label']}"


def _hellaswag(row: Row) -> tuple[str, str]:
    question = "Please choose the correct ending to complete the given sentence: "
    text, kinds = _format_choices("Ending", row["endings"])
    question += f"{row['activity_label']}: {row['ctx']}"
    return f"{question}\n\n{text}\n\nAnswer format: {kinds}", f"ending{int(row['label']) + 1}"


def _winogrande(row: Row) -> tuple[str, str]:
    question = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    choices = f"Option1: {row['option1']} Option2: {row['option2']}"
    text = f"{question}{row['sentence']}\n\n{choices} Answer format: option1/option2"
    return text, f"option{row['answer']}"


def _science(row: Row) -> tuple[str, str]:
    """ARC and OpenBookQA."""
    question = row["question"] if "question" in row else row["question_stem"]
    place = list(row["choices"]["label"]).index(row["answerKey"])
    return _format_question(question, row["choices"]["text"]), f"answer{place + 1}"


def _format_question(question: str, texts: list[str]) -> str:
    text, kinds = _format_choices("Answer", texts)
    return f"Please choose the correct answer to the question: {question}\n\n{text}\n\nAnswer format: {kinds}"


def _format_choices(kind: str, texts: list[str]) -> tuple[str, str]:
    numbered = list(enumerate(texts, start=1))
    names = "/".join(f"{kind.lower()}{number}" for number, _ in numbered)
    return " ".join(f"{kind}{number}: {text}" for number, text in numbered), names


def _arc(subset: str) -> Table:
    return Table(
        "allenai/ai2_arc", "test", {"question": str, "choices": object, "answerKey": str}, subset=subset
    )


TEST_SETS: tuple[tuple[Table, Callable[[Row], tuple[str, str]]], ...] = (
    (Table("google/boolq", "validation", {"question": str, "answer": object}), _boolq),
    (
        Table(
            "ybisk/piqa",
            "validation",
            {"goal": str, "sol1": str, "sol2": str, "label": range(2)},
            revision=PARQUET_REVISION,
        ),
        _piqa,
    ),
    (
        Table(
            "allenai/social_i_qa",
            "validation",
            dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), str),
            revision=PARQUET_REVISION,
        ),
        _siqa,
    ),
    (
        Table(
            "Rowan/hellaswag",
            "validation",
            {"activity_label": str, "ctx": str, "endings": object, "label": str},
        ),
        _hellaswag,
    ),
    (
        Table(
            "allenai/winogrande",
            "validation",
            dict.fromkeys(("sentence", "option1", "option2", "answer"), str),
            subset="winogrande_xl",
        ),
        _winogrande,
    ),
    (_arc("ARC-Easy"), _science),
    (_arc("ARC-Challenge"), _science),
    (
        Table(
            "allenai/openbookqa",
            "test",
            {"question_stem": str, "choices": object, "answerKey": str},
            subset="main",
        ),
        _science,
    ),
)


class Commonsense15k(Task):
    name = "commonsense_15k"
    title = "commonsense-15k to eight sets"
    metric = "exact_match"
    floor = 0.0
    default_model = "Qwen/Qwen3-0.6B-Base"
    output = "generation"
    max_new_tokens = 32
    stop = ("###",)
    grade_at = "last_evaluation"
    defaults = instruction_defaults(15_000, 400, 1200, 702, learning_rates=LEARNING_RATES[1:])

    def examples(self, split: Split, count: int) -> list[Example]:
        return _examples(split, count)

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import choice

        return choice.grade(answer, example.reference or "")


@cached_by_data_folder
def _examples(split: Split, count: int) -> list[Example]:
    if split == "test":
        each = -(-count // len(TEST_SETS))
        sets = []
        for table, to_question in TEST_SETS:
            drawn = list(read_rows(table, "commonsense_15k"))
            # Files have an order: HellaSwag's (from memory) all of ActivityNet before WikiHow.
            random.Random("commonsense_15k").shuffle(drawn)
            sets.append([_example(*to_question(row), split) for row in drawn[:each]])
        return require_count(
            [one for turn in zip(*sets, strict=False) for one in turn], count, "commonsense_15k", split
        )
    found = [
        _example(row["instruction"], row["answer"], split)
        for row in read_rows(TRAIN, "commonsense_15k")
        if hash_split(row["instruction"], ("validation",), HASH_BUCKETS) == split
    ]
    random.Random("commonsense_15k").shuffle(found)
    return require_count(found, count, "commonsense_15k", split)


def _example(question: str, answer: str, split: Split) -> Example:
    truth = None if split == "train" else answer
    return Example(PROMPT.format(instruction=question), f" the correct answer is {answer}", reference=truth)
