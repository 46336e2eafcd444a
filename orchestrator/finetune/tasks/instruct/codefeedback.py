"""CodeFeedback-Filtered-Instruction (OpenCodeInterpreter, 2402.14658) to HumanEval: the survey's code.

156,526 programming questions with answers, of which this takes the Python ones (about 104,800) and of these
the first 100,000, the survey's number. An answer ends with its first block of code, as LoRA-GA's
reproduction (`reproduce/data.py`) has it. Rows in whose question the description of a HumanEval problem
stands are left out: the data set's sources carry some (85 rows hold HumanEval/163 alone). The survey says
nothing of that.

Test: HumanEval's 164 problems, pass@1 as the mean of 8 samples, as in the survey. Its temperature is not
known: 0.8 and nucleus 0.95 are what LoRA-GA's paper is remembered to take (its code does not say). The
prompt is that of its `reproduce/eval_humaneval.py`, in the words of the training prompt (one line break
less): the whole function is asked for, and the answer begins inside a block of code, whose end is the stop.

Validation has two halves, in turns. Its loss is that of held-out CodeFeedback answers, which the training
loss can be compared with; that is what early stopping and the rule for divergence look at, and all that
evaluations on the way compute. Its metric, which choices look at, is pass@1 on MBPP's test problems (never
reported, so free for this), 8 samples each, in HumanEval's form: the signature of the reference, the text
as docstring, one test as example. It is a number of the test's kind. Its sampling error at 0.35 on 200
problems is 3.4 points between sets of problems; rates and variants are compared on the same 200.

Programs are run in a sandbox (`grading.code`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

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
HASH_BUCKETS = 250  # about 420 of the Python rows
MAX_ROW_LENGTH = 4096  # characters, about 1,000 tokens, of a held-out row: nothing cuts those
KEY_LENGTH = 60  # characters of a description, or 30 where it has no more
INSTRUCTION = """Complete the following Python code:\x20
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{code}
```"""


class CodeFeedback(Task):
    name = "codefeedback"
    title = "CodeFeedback to HumanEval"
    metric = "pass_at_1"
    floor = 0.0
    default_model = "Qwen/Qwen3-0.6B-Base"
    numerics = 2  # under 1 exceptions of a program, and objects as its answers, were judged differently
    output = "generation"
    max_new_tokens = 512
    samples = 8
    temperature = 0.8
    top_p = 0.95
    stop = ("\n```",)
    grade_at = "last_evaluation"
    defaults = instruction_defaults(
        100_000, 400, 164, 1562, max_length=1024, accumulation=16, weight_decay=5e-4
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return _examples(split, count)

    def check_can_grade(self) -> None:
        from orchestrator.finetune.grading.code import sandbox_level

        sandbox_level()

    def grade(self, example: Example, answer: str) -> float:
        return self.grade_all([example], [answer])[0]

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        from orchestrator.finetune.grading.code import grade_programs, human_eval_program, mbpp_program

        programs = []
        for example, answer in zip(examples, answers, strict=True):
            problem = json.loads(example.reference or "{}")
            make = mbpp_program if "test_list" in problem else human_eval_program
            programs.append(make(problem, answer))
        return [float(verdict.passed) for verdict in grade_programs(programs)]


@cached_by_data_folder
def _examples(split: Split, count: int) -> list[Example]:
    if split == "test":
        return require_count(
            [_human_eval_example(row) for row in read_rows(HUMAN_EVAL, "codefeedback")],
            count,
            "codefeedback",
            split,
        )
    if split == "train":
        training_examples = (
            _training_example(row) for row, _ in zip(_python_rows("train"), range(count), strict=False)
        )
        return require_count(list(training_examples), count, "codefeedback", split)
    loss_examples = (
        _training_example(row, "loss") for row in _python_rows("validation") if _length(row) <= MAX_ROW_LENGTH
    )
    mbpp_examples = (
        example for row in read_rows(MBPP, "codefeedback") if (example := _mbpp_example(row)) is not None
    )
    pairs = zip(loss_examples, mbpp_examples, range((count + 1) // 2), strict=False)
    return require_count(list(chain.from_iterable((a, b) for a, b, _ in pairs)), count, "codefeedback", split)


def _python_rows(split: Split) -> Iterator[Mapping[str, Any]]:
    """The Python rows of a split that are not HumanEval's, with answers up to the end of their code."""
    problem_keys = [_problem_key(row["prompt"]) for row in read_rows(HUMAN_EVAL, "codefeedback")]
    problem_keys = [key for key in problem_keys if len(key) >= KEY_LENGTH // 2]
    for row in read_rows(TRAIN, "codefeedback"):
        if row["lang"] != "python" or hash_split(row["query"], ("validation",), HASH_BUCKETS) != split:
            continue
        question = " ".join(row["query"].lower().split())
        if not any(key in question for key in problem_keys) and row["answer"].strip():
            yield {**row, "answer": cut_after_first_block(row["answer"])}


def _problem_key(prompt: str) -> str:
    """What a HumanEval problem is known by: the beginning of its description, without the layout."""
    docstrings = re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', prompt, re.DOTALL)
    words = " ".join("".join(docstrings[-1]).lower().split()) if docstrings else ""
    return words[:KEY_LENGTH]


def cut_after_first_block(answer: str) -> str:
    """Up to the end of its first fenced block; all of an answer without one."""
    pieces = answer.split("```")
    return "```".join(pieces[:2]) + "```" if len(pieces) > 2 else answer


def _length(row: Mapping[str, Any]) -> int:
    return len(row["query"]) + len(row["answer"])


def _training_example(row: Mapping[str, Any], counts_in: Any = "both") -> Example:
    return Example(ALPACA_PROMPT.format(instruction=row["query"]) + "\n", row["answer"], counts_in=counts_in)


def _human_eval_example(row: Mapping[str, Any]) -> Example:
    truth = {name: row[name] for name in ("prompt", "entry_point", "test")}
    return Example(
        _prompt(row["prompt"]), f"{row['prompt']}{row['canonical_solution']}```", reference=json.dumps(truth)
    )


def _mbpp_example(row: Mapping[str, Any]) -> Example | None:
    """None for the few whose reference does not define what the tests call."""
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
    truth = {
        "test_list": list(row["test_list"]),
        "test_setup_code": row["test_setup_code"],
        "entry_point": called[0].name,
    }
    return Example(_prompt(prompt), f"{code.strip()}\n```", reference=json.dumps(truth), counts_in="metric")


def _prompt(code: str) -> str:
    return ALPACA_PROMPT.format(instruction=INSTRUCTION.format(code=code)) + "\n```python\n"
