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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, starmap

from orchestrator.finetune.sources.hub_data import CellType, Table
from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.hub_tasks import InstructionTask, Row

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


MAX_ROW_LENGTH = 4096  # characters (about 1,000 tokens) of a held-out row, which is not truncated
KEY_LENGTH = 60  # characters at the start of a description; shorter ones need at least 30
PROMPT_HASH_BUCKETS = 4
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)
HUMAN_EVAL_COLUMNS: dict[str, CellType] = dict.fromkeys(
    ("prompt", "canonical_solution", "test", "entry_point"), str
)
MBPP = "google-research-datasets/mbpp:full@4bb6404fdc6cacfda99d4ac4205087b89d32030c"
"""No result is reported on its test problems, so that validation may use them."""
MBPP_COLUMNS: dict[str, CellType] = {"text": str, "code": str, "test_list": object, "test_setup_code": str}
IFEVAL_COLUMNS: dict[str, CellType] = {"prompt": str, "instruction_id_list": object, "kwargs": object}
INSTRUCTION = """Complete the following Python code:\x20
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{code}
```"""


class CodeFeedback(InstructionTask):
    """Writing programs.

    An answer is cut after its first block of code, as in LoRA-GA's reproduction (`reproduce/data.py`). Rows
    whose question contains the description of a HumanEval problem are left out, since the sources of the
    dataset contain some (85 rows contain HumanEval/163 alone). The survey does not mention this.

    The prompt of a problem is that of LoRA-GA's `reproduce/eval_humaneval.py` inside the training prompt (one
    line break less). It asks for the complete function, and the answer starts inside a block of code, at
    whose end it stops. Programs are run in a sandbox (`grading/programs.py`).
    """

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
        mbpp_rows = self.read_rows(self.table("test", MBPP_COLUMNS, MBPP))
        mbpp_examples = filter(None, map(self._mbpp_example, mbpp_rows))
        return chain.from_iterable(zip(loss_examples, mbpp_examples, strict=False))

    def _human_eval_rows(self) -> Iterator[Row]:
        return self.read_rows(self.table(self.test_split, HUMAN_EVAL_COLUMNS, self.test_data))

    def _python_rows(self, split: Split) -> Iterator[Row]:
        """Yield the Python rows of a split without HumanEval problems, cut after the first block of code."""
        problem_keys = [_problem_key(row["prompt"]) for row in self._human_eval_rows()]
        problem_keys = [key for key in problem_keys if len(key) >= KEY_LENGTH // 2]
        for row in self.training_rows(split, query=str, answer=str, lang=str):
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
        return Example(self._problem_prompt(row["prompt"]), answer, reference=reference)

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
        answer = f"{code.strip()}\n```"
        reference_text = json.dumps(reference)
        return Example(self._problem_prompt(prompt), answer, reference=reference_text, counts_in="metric")

    def _problem_prompt(self, code: str) -> str:
        return f"{self.fill(self.prompt, {'query': INSTRUCTION.format(code=code)})}```python\n"


class Alpaca(InstructionTask):
    """Following instructions that can be checked by lm-eval's checker (`grading/text_answers.py`).

    IFEval has 541 prompts, and there is no similar dataset for validation. Therefore a quarter of the
    prompts, chosen by their hash, are the validation split, and the other 405 or so are the test split. This
    is not quite the published set, but no choice depends on test prompts. IFEval has no reference answers, so
    there is no test loss.
    """

    def read_examples(self, split: Split) -> Iterable[Example]:
        columns = dict.fromkeys(("instruction", "input", "output"), str)
        training_examples = map(self._training_example, self.training_rows(split, **columns))
        if split == "train":
            return training_examples
        ifeval_examples = (
            self._ifeval_example(row)
            for row in self.read_rows(self.table(self.test_split, IFEVAL_COLUMNS, self.test_data))
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
        return Example(self.fill(PROMPT_WITH_INPUT if row["input"] else self.prompt, row), row["output"])

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
