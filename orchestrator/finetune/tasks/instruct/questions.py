"""Questions with one right answer: MetaMathQA to GSM8K, and commonsense-15k to eight sets."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, starmap

from orchestrator.finetune.sources.hub_data import CellType, Table
from orchestrator.finetune.tasks.base import Example, Split
from orchestrator.finetune.tasks.instruction_task import InstructionTask, Row

CALCULATOR_ANNOTATION = re.compile("<<.*?>>")
"""Annotations for a calculator in GSM8K's solutions, which MetaMathQA does not have."""
PARQUET_REVISION = "refs/convert/parquet"
"""The hub's own conversion, for datasets with a loading script, which `datasets` no longer runs."""


class MetaMathQA(InstructionTask):
    """Solving grade-school math problems: MetaMathQA to GSM8K.

    One twelfth of the original questions is held out with all rows made from them, since a rephrased question
    is not a new one. The validation split has one held-out row of type GSM_AnsAug per question: these are
    GSM8K's training questions in their original words, like the test questions. Rephrased questions were
    written by a model, backward questions (SV, FOBAR) ask for an x, which GSM8K never does, and MATH is
    another benchmark.
    """

    def read_examples(self, split: Split) -> Iterator[Example]:
        if split == "test":
            columns: dict[str, CellType] = {"question": str, "answer": str}
            for row in self.read_rows(self.table("test", columns, self.test_data)):
                solution, _, number = row["answer"].rpartition("####")
                solution = CALCULATOR_ANNOTATION.sub("", solution).strip()
                yield self._example(row["question"], f"{solution}\nThe answer is: {number.strip()}", split)
            return
        columns = dict.fromkeys(("type", "query", "original_question", "response"), str)
        seen: set[str] = set()
        for training_row in self.training_rows(split, **columns):
            key = self.split_key(training_row)
            if split == "train" or (training_row["type"] == "GSM_AnsAug" and key not in seen):
                seen.add(key)
                yield self._example(training_row["query"], training_row["response"], split)

    def split_key(self, row: Row) -> str:
        return str(row["original_question"]).strip()

    def _example(self, question: str, solution: str, split: Split) -> Example:
        reference = None if split == "train" else solution.rpartition("The answer is:")[2].strip()
        row = {"query": question, "response": solution}
        return Example(self.fill(self.prompt, row), self.fill(self.answer, row), reference=reference)


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
    """Multiple-choice questions.

    A question ends with its choices and "Answer format: ...", and an answer is "the correct answer is ...".
    Both are confirmed by outputs shown in repositories. The test split takes rows of the public split with
    labels of each set in turn, so that all have the same weight; BoolQ is without its passage, as in
    LLM-Adapters.
    """

    def read_examples(self, split: Split) -> Iterable[Example]:
        if split == "test":
            return chain.from_iterable(zip(*starmap(self._read_test_set, TEST_SETS), strict=False))
        # The file is sorted by kind, so the sample of it is taken after shuffling.
        kept = [*self.training_rows(split, instruction=str, answer=str)]
        random.Random("commonsense_15k").shuffle(kept)
        return (self._example(row["instruction"], row["answer"], split) for row in kept)

    def _read_test_set(self, table: Table, to_question: ToQuestion) -> Iterator[Example]:
        rows = list(self.read_rows(table))
        # Some files are sorted: HellaSwag, as we remember it, has all of ActivityNet before WikiHow.
        random.Random("commonsense_15k").shuffle(rows)
        return (self._example(*to_question(row), "test") for row in rows)

    def _example(self, question: str, answer: str, split: Split) -> Example:
        row = {"instruction": question, "answer": answer}
        reference = None if split == "train" else answer
        return Example(self.fill(self.prompt, row), self.fill(self.answer, row), reference=reference)
