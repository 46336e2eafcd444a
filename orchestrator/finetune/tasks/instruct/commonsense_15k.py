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
choice is extracted from the answer's text (`grading/text_answers.py`), nearly as by LLM-Adapters'
`extract_answer`. Its evaluation uses four beams; decoding here is greedy, as in "Learning Rate Matters"
(2602.04998).

Test: the public split with labels of each set, in turn so that all have the same weight: BoolQ (without its
passage, as in LLM-Adapters), PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge, OpenBookQA. PIQA
and SIQA are read from the hub's own conversion to Parquet, since `datasets` no longer runs loading scripts.
By default 150 random questions of each set are used, always the same ones (LLM-Adapters: all 22,000). At an
accuracy of 0.8 the standard error is 1.2 points. The validation split consists of held-out training
questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, starmap
from typing import Any

from orchestrator.finetune.sources.hub_data import CellType, Table
from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.instruction_task import LEARNING_RATES, InstructionTask, instruction_defaults

TRAIN = Table("zwhe99/commonsense_170k", "train", dict.fromkeys(("instruction", "output", "answer"), str))
HASH_BUCKETS = 50  # one of them, about 3,400 of 170,000 rows, is held out
INDENT = " " * 16
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    f"request. \n\n{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n{INDENT}### Response:\n{INDENT[1:]}"
)
PARQUET_REVISION = "refs/convert/parquet"

Row = Mapping[str, Any]
ToQuestion = Callable[[Row], tuple[str, str]]
"""Returns the question and the answer of a row."""


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


PIQA_COLUMNS: dict[str, CellType] = {"goal": str, "sol1": str, "sol2": str, "label": range(2)}
SIQA_COLUMNS = dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), str)
HELLASWAG_COLUMNS = {"activity_label": str, "ctx": str, "endings": object, "label": str}
WINOGRANDE_COLUMNS = dict.fromkeys(("sentence", "option1", "option2", "answer"), str)
ARC_COLUMNS = {"question": str, "choices": object, "answerKey": str}
OPENBOOKQA_COLUMNS = {"question_stem": str, "choices": object, "answerKey": str}
TEST_SETS: tuple[tuple[Table, ToQuestion], ...] = (
    (Table("google/boolq", "validation", {"question": str, "answer": object}), _boolq),
    (Table("ybisk/piqa", "validation", PIQA_COLUMNS, revision=PARQUET_REVISION), _piqa),
    (Table("allenai/social_i_qa", "validation", SIQA_COLUMNS, revision=PARQUET_REVISION), _siqa),
    (Table("Rowan/hellaswag", "validation", HELLASWAG_COLUMNS), _hellaswag),
    (Table("allenai/winogrande", "validation", WINOGRANDE_COLUMNS, "winogrande_xl"), _winogrande),
    (Table("allenai/ai2_arc", "test", ARC_COLUMNS, "ARC-Easy"), _science),
    (Table("allenai/ai2_arc", "test", ARC_COLUMNS, "ARC-Challenge"), _science),
    (Table("allenai/openbookqa", "test", OPENBOOKQA_COLUMNS, "main"), _science),
)


class Commonsense15k(InstructionTask):
    """Multiple-choice questions: commonsense-15k to eight sets."""

    name = "commonsense_15k"
    title = "commonsense-15k to eight sets"
    max_new_tokens = 32
    stop = ("###",)
    defaults = instruction_defaults(15_000, 400, 1200, 702, learning_rates=LEARNING_RATES[1:])

    def read_examples(self, split: Split) -> Iterable[Example]:
        if split == "test":
            return chain.from_iterable(zip(*starmap(self._read_test_set, TEST_SETS), strict=False))
        rows = self.read_rows(TRAIN)
        kept = [r for r in rows if hash_split(r["instruction"], ("validation",), HASH_BUCKETS) == split]
        random.Random("commonsense_15k").shuffle(kept)
        return (_example(row["instruction"], row["answer"], split) for row in kept)

    def _read_test_set(self, table: Table, to_question: ToQuestion) -> Iterator[Example]:
        rows = list(self.read_rows(table))
        # Some files are sorted: HellaSwag, as we remember it, has all of ActivityNet before WikiHow.
        random.Random("commonsense_15k").shuffle(rows)
        return (_example(*to_question(row), "test") for row in rows)

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import text_answers

        return text_answers.grade_choice(answer, example.reference or "")


def _example(question: str, answer: str, split: Split) -> Example:
    reference = None if split == "train" else answer
    prompt = PROMPT.format(instruction=question)
    return Example(prompt, f" the correct answer is {answer}", reference=reference)
