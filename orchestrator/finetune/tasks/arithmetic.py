"""Arithmetic on problems of the package reasoning-gym: sums, and grade-school problems."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from orchestrator.finetune.tasks.base import Example, Split
from orchestrator.finetune.tasks.examples import split_by_key
from orchestrator.finetune.tasks.user_task import LocalTask
from orchestrator.util.errors import require_package

SUM_DRAWS, PROBLEM_DRAWS = 6000, 12_000
MAX_QUESTION_LENGTH, MAX_ANSWER_LENGTH = 240, 220
"""In characters: short problems are trained on within minutes on a CPU."""
QUESTION_SUFFIX = " Give the result as your final answer. Do not include units."
"""The end of every question of `gsm_symbolic`, which is removed."""


class ChainSum(LocalTask, entry="chain_sum"):
    """Computing sums and differences of two numbers of one or two digits (`chain_sum`).

    The default model, SmolLM2-135M, gives few answers in the required form before a minute of training, and
    most of them after it. All questions have one wording. The split depends on the expression alone and is
    the same for `a + b` and `b + a`.
    """

    def examples(self, split: Split, count: int) -> list[Example]:
        return _sums()[split][:count]


@lru_cache(maxsize=1)
def _sums() -> dict[Split, list[Example]]:
    """Return the distinct expressions among the first SUM_DRAWS of the generator, in its order."""
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    examples: dict[str, Example] = {}
    for item in _draw("chain_sum", SUM_DRAWS, **digits):
        key = canonical_expression(item["metadata"]["expression"])
        examples.setdefault(key, Example(f"{item['question']}\nAnswer:", f" {item['answer']}"))
    return split_by_key(examples.items())


def canonical_expression(expression: str) -> str:
    """Return an expression with the operands of `+` in ascending order; a difference keeps its order.

    Args:
        expression: Two integers with an operator between them, separated by blanks.
    """
    left, operator, right = expression.split()
    if operator == "+" and int(left) > int(right):
        left, right = right, left
    return f"{left} {operator} {right}"


class GsmSymbolic(LocalTask, entry="gsm_symbolic"):
    """Solving grade-school problems of known templates (`gsm_symbolic`), with worked answers.

    The generator follows GSM-Symbolic (arXiv 2410.05229). It has 85 templates, each made from one problem of
    GSM8K; the task uses the 39 whose question and answer are short. Held-out problems have the same templates
    as training problems and other numbers. So a score shows that the model applies a known solution, not that
    it finds one: SmolLM2-135M does not learn to solve problems of new templates (docs/real_tasks.md).
    """

    def examples(self, split: Split, count: int) -> list[Example]:
        return _problems()[split][:count]


@lru_cache(maxsize=1)
def _problems() -> dict[Split, list[Example]]:
    """Return the distinct short problems among the first PROBLEM_DRAWS of the generator, in its order."""
    problems = _draw("gsm_symbolic", PROBLEM_DRAWS)
    keyed_examples: dict[str, tuple[str, Example]] = {}
    for template, item in zip(problems.task_indices, problems, strict=True):
        question = item["question"].removesuffix(QUESTION_SUFFIX)
        answer = re.sub(r"(\d)\.0\b", r"\1", item["metadata"]["answer_cot"])  # 12.0 apples
        if len(question) <= MAX_QUESTION_LENGTH and len(answer) <= MAX_ANSWER_LENGTH:
            numbers = re.findall(r"\d+", question)
            example = Example(f"{question}\nAnswer:", f" {answer}")
            keyed_examples.setdefault(question, (f"{template}: {numbers}", example))
    return split_by_key(keyed_examples.values())


def _draw(name: str, size: int, **options: Any) -> Any:
    """Return the first problems of a generator with the seed 0; its name is also that of the task."""
    require_package(f"Task {name!r}", "reasoning_gym", "real")
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=size, **options)
