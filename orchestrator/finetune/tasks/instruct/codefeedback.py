"""Training on CodeFeedback, evaluation on HumanEval: the survey's code task.

Training: CodeFeedback-Filtered-Instruction (OpenCodeInterpreter, 2402.14658) has 156,526 programming
questions with answers. About 104,800 of them are about Python, and the first 100,000 of these are used, as
many as in the survey. An answer is cut after its first block of code, as in LoRA-GA's reproduction
(`reproduce/data.py`). Rows whose question contains the description of a HumanEval problem are left out,
since the sources of the dataset contain some (85 rows contain HumanEval/163 alone). The survey does not
mention this.

Test: HumanEval's 164 problems; the score is pass@1 as the mean of 8 samples, as in the survey. The survey
does not give its temperature. 0.8 with top-p 0.95 are LoRA-GA's values as we remember its paper; its code
does not contain them. The prompt is that of LoRA-GA's `reproduce/eval_humaneval.py` inside the training
prompt (with one line break less). It asks for the complete function, and the answer starts inside a block
of code, at whose end it stops.

Validation has two kinds of examples, which alternate. The loss is computed on held-out CodeFeedback
answers, so that it can be compared with the training loss. Early stopping and the divergence rule use it,
and evaluations before the last one compute nothing else. The metric is pass@1 on MBPP's test problems, 8
samples each, and the best learning rate is chosen by it; no result on MBPP is reported, so its test
problems may be used for this. They are written in HumanEval's form: the signature of the reference
solution, the text as docstring, one test as an example. At a score of 0.35, 200 problems have a standard
error of 3.4 points as a sample of all problems; learning rates and variants are compared on the same 200
problems.

Programs are run in a sandbox (`grading/programs.py`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from orchestrator.finetune.sources.hub_data import Table
from orchestrator.finetune.tasks.base import Example, Split, hash_split
from orchestrator.finetune.tasks.instruction_task import ALPACA_PROMPT, InstructionTask, instruction_defaults

# Commits of main on 2026-08-11, taken from the cards of a public survey of datasets.
TRAIN = Table(
    "m-a-p/CodeFeedback-Filtered-Instruction",
    "train",
    {"query": str, "answer": str, "lang": str},
    revision="a08c213a9748c66c15d0225814be80a2e77adf4a",
)
HUMAN_EVAL = Table(
    "openai/openai_humaneval",
    "test",
    dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point"), str),
    revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
)
MBPP = Table(
    "google-research-datasets/mbpp",
    "test",
    {"text": str, "code": str, "test_list": object, "test_setup_code": str},
    subset="full",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
)
HASH_BUCKETS = 250  # one of them, about 420 Python rows, is held out
MAX_ROW_LENGTH = 4096  # characters (about 1,000 tokens) of a held-out row, which is not truncated
KEY_LENGTH = 60  # characters at the start of a description; shorter ones need at least 30
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
    """Writing programs: CodeFeedback to HumanEval."""

    name = "codefeedback"
    title = "CodeFeedback to HumanEval"
    metric = "pass_at_1"
    max_new_tokens = 512
    samples = 8
    temperature = 0.8
    top_p = 0.95
    stop = ("\n```",)
    defaults = instruction_defaults(
        100_000, 400, 164, 1562, max_length=1024, accumulation=16, weight_decay=5e-4
    )

    def read_examples(self, split: Split) -> Iterable[Example]:
        if split == "test":
            return map(_human_eval_example, self.read_rows(HUMAN_EVAL))
        if split == "train":
            return map(_training_example, self._python_rows("train"))
        loss_examples = (
            replace(_training_example(row), counts_in="loss")
            for row in self._python_rows("validation")
            if len(row["query"]) + len(row["answer"]) <= MAX_ROW_LENGTH
        )
        mbpp_examples = filter(None, map(_mbpp_example, self.read_rows(MBPP)))
        return chain.from_iterable(zip(loss_examples, mbpp_examples, strict=False))

    def _python_rows(self, split: Split) -> Iterator[Mapping[str, Any]]:
        """Yield the Python rows of a split without HumanEval problems, cut after the first block of code."""
        problem_keys = [_problem_key(row["prompt"]) for row in self.read_rows(HUMAN_EVAL)]
        problem_keys = [key for key in problem_keys if len(key) >= KEY_LENGTH // 2]
        for row in self.read_rows(TRAIN):
            if row["lang"] != "python" or hash_split(row["query"], ("validation",), HASH_BUCKETS) != split:
                continue
            question = " ".join(row["query"].lower().split())
            if not any(key in question for key in problem_keys) and row["answer"].strip():
                yield {**row, "answer": cut_after_first_block(row["answer"])}

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


def _training_example(row: Mapping[str, Any]) -> Example:
    return Example(ALPACA_PROMPT.format(instruction=row["query"]) + "\n", row["answer"])


def _human_eval_example(row: Mapping[str, Any]) -> Example:
    reference = json.dumps({name: row[name] for name in ("prompt", "entry_point", "test")})
    answer = f"{row['prompt']}{row['canonical_solution']}```"
    return Example(_prompt(row["prompt"]), answer, reference=reference)


def _mbpp_example(row: Mapping[str, Any]) -> Example | None:
    """Return an MBPP problem, None if its reference solution lacks the function that its tests call."""
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
    return Example(_prompt(prompt), answer, reference=json.dumps(reference), counts_in="metric")


def _prompt(code: str) -> str:
    return ALPACA_PROMPT.format(instruction=INSTRUCTION.format(code=code)) + "\n```python\n"
