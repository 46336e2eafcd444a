"""Sums and differences of two numbers of one or two digits, from reasoning-gym (`chain_sum`).

The default model, SmolLM2-135M, gives few answers in the required form before a minute of training, and most
of them after it. All questions have one wording. The split depends on the expression alone and is the same
for `a + b` and `b + a`.
"""

from __future__ import annotations

from functools import lru_cache

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.examples import split_by_key
from orchestrator.finetune.tasks.reasoning_gym_data import create_dataset

DRAWS = 6000
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


class ChainSum(Task):
    """Computing sums and differences of two numbers."""

    name = "chain_sum"
    title = "sums of two numbers (reasoning-gym)"
    floor = 0.0
    default_model = "smollm2-135m"
    max_new_tokens = 8
    defaults = TaskDefaults(
        240, 100, 100, steps=60, batch_size=4, max_length=40, evaluations=3, learning_rates=LEARNING_RATES
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return _all_examples()[split][:count]


@lru_cache(maxsize=1)
def _all_examples() -> dict[Split, list[Example]]:
    """Return the distinct expressions among the first DRAWS of the generator, in its order."""
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    examples: dict[str, Example] = {}
    for item in create_dataset("chain_sum", DRAWS, **digits):
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
