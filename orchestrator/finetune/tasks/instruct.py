"""Tasks with generated answers whose rows need code; their settings are in `tasks.toml`.

The answers of MetaMathQA (to GSM8K) and of commonsense-15k (to eight sets) are compared with the right ones.
Those of CodeFeedback (to HumanEval) and Alpaca (to IFEval) are decided by a checker. Neither has graded
questions like those of its training data. So the validation split has two kinds of examples, which alternate.
Held-out training answers are for the loss, which can be compared with the training loss: early stopping and
the divergence rule use it, and evaluations before the last one compute nothing else. Problems of a benchmark
are for the metric, by which the best learning rate is chosen.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.hub_tasks import InstructionTask, Row
from orchestrator.util.errors import UsageError

CALCULATOR_ANNOTATION = re.compile("<<.*?>>")
"""Annotations for a calculator in GSM8K's solutions, which MetaMathQA does not have."""


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
            for row in self.read_rows("test", {"question": str, "answer": str}, self.test_data):
                solution, _, number = row["answer"].rpartition("####")
                solution = CALCULATOR_ANNOTATION.sub("", solution).strip()
                response = f"{solution}\nThe answer is: {number.strip()}"
                yield self._example({"query": row["question"], "response": response}, split)
            return
        seen: set[str] = set()
        for training_row in self.training_rows(split, "type", "query", "original_question", "response"):
            key = self.split_key(training_row)
            if split == "train" or (training_row["type"] == "GSM_AnsAug" and key not in seen):
                seen.add(key)
                yield self._example(training_row, split)

    def split_key(self, row: Row) -> str:
        return str(row["original_question"]).strip()

    def _example(self, row: Row, split: Split) -> Example:
        reference = None if split == "train" else row["response"].rpartition("The answer is:")[2].strip()
        return self.make_example(row, reference=reference)


class Commonsense15k(InstructionTask):
    """Multiple-choice questions.

    A question ends with its choices and "Answer format: ...", and an answer is "the correct answer is ...".
    Both are confirmed by outputs shown in repositories. The test split takes rows of the public split with
    labels of each set in turn, so that all have the same weight; BoolQ is without its passage, as in
    LLM-Adapters.
    """

    keys = (*InstructionTask.keys, "test_sets")
    test_sets: tuple[Mapping[str, Any], ...]
    """Each has a dataset, its split, the template of a question, the column of the answer and, by the cells
    of that column, the answers. Without answers the column `choices` has texts and labels of any number."""

    def read_examples(self, split: Split) -> Iterable[Example]:
        if split == "test":
            return chain.from_iterable(zip(*map(self._read_test_set, self.test_sets), strict=False))
        # The file is sorted by kind, so the sample of it is taken after shuffling.
        kept = [*self.training_rows(split, "instruction", "answer")]
        random.Random("commonsense_15k").shuffle(kept)
        return (self.make_example(r, reference=None if split == "train" else r["answer"]) for r in kept)

    def _read_test_set(self, test_set: Mapping[str, Any]) -> Iterator[Example]:
        question, column = test_set["question"], test_set["column"]
        columns = dict.fromkeys((*self.columns_of(question), column), object)
        rows = list(self.read_rows(test_set["split"], columns, test_set["data"]))
        # Some files are sorted: HellaSwag, as we remember it, has all of ActivityNet before WikiHow.
        random.Random("commonsense_15k").shuffle(rows)
        for row in rows:
            answers = test_set.get("answers")
            cells = row
            if answers is None:
                texts = list(enumerate(row["choices"]["text"], start=1))
                listed = " ".join(f"Answer{number}: {text}" for number, text in texts)
                names = [f"answer{number}" for number, _ in texts]
                answers = dict(zip(row["choices"]["label"], names, strict=True))
                cells = {**row, "choices": f"{listed}\n\nAnswer format: {'/'.join(names)}"}
            if (answer := answers.get(str(row[column]))) is None:
                raise UsageError(
                    f"Task {self.name!r}: {column!r} of {test_set['data']} is {row[column]!r}; "
                    f"must be one of {', '.join(answers)}."
                )
            filled = {"instruction": self.fill(question, cells), "answer": answer}
            yield self.make_example(filled, reference=answer)


MAX_ROW_LENGTH = 4096  # characters (about 1,000 tokens) of a held-out row, which is not truncated
KEY_LENGTH = 60  # characters at the start of a description; shorter ones need at least 30
PROMPT_HASH_BUCKETS = 4
HUMAN_EVAL_COLUMNS = dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point"), str)
MBPP_COLUMNS = {"text": str, "code": str, "test_list": object, "test_setup_code": str}
IFEVAL_COLUMNS = {"prompt": str, "instruction_id_list": object, "kwargs": object}


class CodeFeedback(InstructionTask):
    """Writing programs.

    An answer is cut after its first block of code, as in LoRA-GA's reproduction (`reproduce/data.py`). Rows
    whose question contains the description of a HumanEval problem are left out, since the sources of the
    dataset contain some (85 rows contain HumanEval/163 alone). The survey does not mention this.

    The prompt of a problem is that of LoRA-GA's `reproduce/eval_humaneval.py` inside the training prompt (one
    line break less). It asks for the complete function, and the answer starts inside a block of code, at
    whose end it stops. Programs are run in a sandbox (`grading/programs.py`).
    """

    keys = (*InstructionTask.keys, "validation_data", "problem_prompt")
    validation_data: str
    """The dataset of MBPP in the form of `data`."""
    problem_prompt: str
    """The template of the prompt of a problem."""

    def read_examples(self, split: Split) -> Iterable[Example]:
        if split == "test":
            return map(self._human_eval_example, self._human_eval_rows())
        if split == "train":
            return map(self._training_example, self._python_rows("train"))
        loss_examples = (
            replace(self._training_example(row), counts_in="loss")
            for row in self._python_rows("validation")
            if len(row["query"]) + len(row["answer"]) <= MAX_ROW_LENGTH
        )
        mbpp_rows = self.read_rows("test", MBPP_COLUMNS, self.validation_data)
        mbpp_examples = filter(None, map(self._mbpp_example, mbpp_rows))
        return chain.from_iterable(zip(loss_examples, mbpp_examples, strict=False))

    def _human_eval_rows(self) -> Iterator[Row]:
        return self.read_rows(self.test_split, HUMAN_EVAL_COLUMNS, self.test_data)

    def _python_rows(self, split: Split) -> Iterator[Row]:
        """Yield the Python rows of a split without HumanEval problems, cut after the first block of code."""
        problem_keys = [_problem_key(row["prompt"]) for row in self._human_eval_rows()]
        problem_keys = [key for key in problem_keys if len(key) >= KEY_LENGTH // 2]
        for row in self.training_rows(split, "query", "answer", "lang"):
            question = " ".join(row["query"].lower().split())
            is_problem = any(key in question for key in problem_keys)
            if row["lang"] == "python" and not is_problem and row["answer"].strip():
                yield {**row, "answer": cut_after_first_block(row["answer"])}

    def _training_example(self, row: Row) -> Example:
        return Example(self.fill(self.prompt, row), row["answer"])

    def check_can_grade(self) -> None:
        from orchestrator.finetune.grading.sandbox.run import sandbox_level

        sandbox_level()

    def grade(self, example: Example, answer: str) -> float:
        return self.grade_all([example], [answer])[0]

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        from orchestrator.finetune.grading.programs import grade_programs, human_eval_program, mbpp_program

        programs = []
        for example, answer in zip(examples, answers, strict=True):
            problem = json.loads(example.reference or "{}")
            make = mbpp_program if "test_list" in problem else human_eval_program
            programs.append(make(problem, answer))
        return [float(result.passed) for result in grade_programs(programs)]

    def _human_eval_example(self, row: Row) -> Example:
        reference = json.dumps({name: row[name] for name in ("prompt", "entry_point", "test")})
        answer = f"{row['prompt']}{row['canonical_solution']}```"
        return Example(self.fill(self.problem_prompt, {"code": row["prompt"]}), answer, reference=reference)

    def _mbpp_example(self, row: Row) -> Example | None:
        """Return an MBPP problem, None if its reference solution lacks the function that its tests call.

        It is written in HumanEval's form: the signature of the reference solution, the text as docstring, one
        test as an example.
        """
        code = row["code"].replace("\r", "")
        try:
            defined = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        except SyntaxError:
            return None
        called = [node for node in defined if f"{node.name}(" in row["test_list"][0]]
        if not called:
            return None
        text = row["text"].strip().replace('"""', "'''")
        example = row["test_list"][0].strip()
        signature = f"def {called[0].name}({ast.unparse(called[0].args)}):"
        prompt = f'{signature}\n    """{text}\n\n    {example}\n    """\n'
        reference = {
            "test_list": list(row["test_list"]),
            "test_setup_code": row["test_setup_code"],
            "entry_point": called[0].name,
        }
        return Example(
            self.fill(self.problem_prompt, {"code": prompt}),
            f"{code.strip()}\n```",
            reference=json.dumps(reference),
            counts_in="metric",
        )


class Alpaca(InstructionTask):
    """Following instructions that can be checked by lm-eval's checker (`grading/text_answers.py`).

    IFEval has 541 prompts, and there is no similar dataset for validation. Therefore a quarter of the
    prompts, chosen by their hash, are the validation split, and the other 405 or so are the test split. This
    is not quite the published set, but no choice depends on test prompts. IFEval has no reference answers, so
    there is no test loss.
    """

    keys = (*InstructionTask.keys, "prompt_with_input")
    prompt_with_input: str
    """The template of the prompt of a row with an input."""

    def read_examples(self, split: Split) -> Iterable[Example]:
        training_rows = self.training_rows(split, "instruction", "input", "output")
        training_examples = map(self._training_example, training_rows)
        if split == "train":
            return training_examples
        ifeval_examples = (
            self._ifeval_example(row)
            for row in self.read_rows(self.test_split, IFEVAL_COLUMNS, self.test_data)
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

    def _training_example(self, row: Row) -> Example:
        return Example(self.fill(self.prompt_with_input if row["input"] else self.prompt, row), row["output"])

    def _ifeval_example(self, row: Row) -> Example:
        # In Parquet the options that an instruction does not have are null.
        kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
        ids = list(row["instruction_id_list"])
        reference = json.dumps({**row, "instruction_id_list": ids, "kwargs": kwargs})
        prompt = self.fill(self.prompt, {"instruction": row["prompt"]})
        return Example(prompt, "", reference=reference, counts_in="metric")


def _problem_key(prompt: str) -> str:
    """Return the key of a HumanEval problem: the start of its description, in lower case."""
    docstrings = re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', prompt, re.DOTALL)
    words = " ".join("".join(docstrings[-1]).lower().split()) if docstrings else ""
    return words[:KEY_LENGTH]


def cut_after_first_block(answer: str) -> str:
    """Return an answer up to the end of its first fenced block, unchanged if it has none.

    Args:
        answer: The answer.
    """
    pieces = answer.split("```")
    return "```".join(pieces[:2]) + "```" if len(pieces) > 2 else answer
