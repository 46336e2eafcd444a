"""Commonsense reasoning: 15,000 training questions and eight evaluation sets.

The task is that of LLM-Adapters (Hu et al. 2023, 2304.01933). The score is the mean accuracy over the sets.

Training: no dataset on the hub is confirmed to be LLM-Adapters' `ft-training_set/commonsense_15k.json`. Its
larger version with 170,000 questions is there (zwhe99/commonsense_170k, used by many repositories), with
the same columns and the same eight kinds of questions. The 15,000 questions here are a fixed random sample
of it: not the same rows as LLM-Adapters', but the same kinds in the same proportions up to chance. The file
is sorted by kind, so the sample is taken after shuffling it.

Prompt: LLM-Adapters' own (`generate_prompt` in `finetune.py` and in its evaluation), including the
indentation of its source, which is a part of it. The last blank belongs to the answer, since byte-pair
tokenizers merge it with the next word anyway. A question ends with its choices and "Answer format: ...",
and an answer is "the correct answer is ...". Both are confirmed by outputs shown in repositories. The
choice is extracted from the answer's text (`grading/choice.py`), nearly as by LLM-Adapters'
`extract_answer`. Its evaluation uses four beams; decoding here is greedy, as in "Learning Rate Matters"
(2602.04998).

Test: the public split with labels of each set, in turn so that all have the same weight: BoolQ (without its
passage, as in LLM-Adapters), PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge, OpenBookQA. PIQA
and SIQA are read from the hub's own conversion to Parquet, since `datasets` no longer runs loading scripts.
The default are 150 random questions of each set, always the same ones (LLM-Adapters: all 22,000). At an
accuracy of 0.8 the standard error is 1.2 points. The validation split consists of held-out training
questions.
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
HASH_BUCKETS = 50  # one of them, about 3,400 of 170,000 rows, is held out
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
    """Return question and answer of a row of ARC or OpenBookQA."""
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
    """Multiple-choice questions: commonsense-15k to eight sets."""

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
            rows = list(read_rows(table, "commonsense_15k"))
            # Some files are sorted: HellaSwag, as we remember it, has all of ActivityNet before WikiHow.
            random.Random("commonsense_15k").shuffle(rows)
            sets.append([_example(*to_question(row), split) for row in rows[:each]])
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
    reference = None if split == "train" else answer
    return Example(
        PROMPT.format(instruction=question), f" the correct answer is {answer}", reference=reference
    )
