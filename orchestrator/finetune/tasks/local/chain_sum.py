"""Sums and differences of two numbers of one or two digits, from reasoning-gym (`chain_sum`).

The default model, SmolLM2-135M, gives few answers in the required form before a minute of training, and most
of them after it. All questions have one wording. The split depends on the expression alone and is the same
for `a + b` and `b + a`.
"""

from __future__ import annotations

from functools import lru_cache

from orchestrator.finetune.tasks.base import (
    SPLITS,
    Example,
    Split,
    Task,
    TaskDefaults,
    hash_split,
    require_count,
)
from orchestrator.util.errors import UsageError

SEED = 0
DRAWS = 6000


class ChainSum(Task):
    """Computing sums and differences of two numbers."""

    name = "chain_sum"
    title = "sums of two numbers (reasoning-gym)"
    metric = "exact_match"
    floor = 0.0
    default_model = "smollm2-135m"
    output = "generation"
    max_new_tokens = 8
    defaults = TaskDefaults(
        train_size=240,
        validation_size=100,
        test_size=100,
        steps=60,
        batch_size=4,
        max_length=40,
        evaluations=3,
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return require_count(_all_examples()[split], count, self.name, split)


@lru_cache(maxsize=1)
def _all_examples() -> dict[Split, tuple[Example, ...]]:
    """Return the distinct expressions among the first DRAWS of the generator, in its order."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError("Task 'chain_sum' needs reasoning-gym: pip install -e \".[real]\"") from error
    items = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2, seed=SEED, size=DRAWS
    )
    seen: set[str] = set()
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for item in items:
        key = canonical_expression(item["metadata"]["expression"])
        if key not in seen:
            seen.add(key)
            example = Example(f"{item['question']}\nAnswer:", f" {item['answer']}")
            found[hash_split(key)].append(example)
    return {split: tuple(examples) for split, examples in found.items()}


def canonical_expression(expression: str) -> str:
    """Return an expression with the operands of `+` in ascending order; a difference keeps its order.

    Args:
        expression: Two integers with an operator between them, separated by blanks.
    """
    left, operator, right = expression.split()
    if operator == "+" and int(left) > int(right):
        left, right = right, left
    return f"{left} {operator} {right}"
