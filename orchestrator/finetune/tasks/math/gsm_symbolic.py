"""Grade-school problems with other names and numbers, from reasoning-gym's `gsm_symbolic` (after
GSM-Symbolic, arXiv 2410.05229): a real language model's task, with a worked answer to learn from.

The package has 85 templates, each the recipe of one problem of GSM8K; shown are those whose question and
answer are short (39 of them). Held-out problems are of the same templates and differ from every other split's
in their numbers: a score says that the model carries a known recipe out, not that it finds one.
SmolLM2-135M does not come to solve templates that it has not seen (docs/real_tasks.md).
"""

from __future__ import annotations

import re
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
DRAWS = 12_000
MAX_QUESTION_LENGTH, MAX_ANSWER_LENGTH = 240, 220
"""Characters at most, so that problems are short enough for minutes on a CPU."""
QUESTION_SUFFIX = " Give the result as your final answer. Do not include units."
"""The package ends every question with it."""


class GsmSymbolic(Task):
    name = "gsm_symbolic"
    title = "grade-school problems of known templates (reasoning-gym)"
    metric = "exact_match"
    floor = 0.0
    default_model = "smollm2-135m"
    output = "generation"
    max_new_tokens = 90
    grade_at = "last_evaluation"
    defaults = TaskDefaults(
        train_size=1200,
        validation_size=200,
        test_size=200,
        steps=150,
        batch_size=8,
        max_length=160,
        evaluations=3,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return require_count(_all_examples()[split], count, self.name, split)

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import math

        return math.grade(answer, example.answer)


@lru_cache(maxsize=1)
def _all_examples() -> dict[Split, tuple[Example, ...]]:
    """Every distinct short problem among the first DRAWS of the generator, in the order drawn."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError("Task 'gsm_symbolic' needs reasoning-gym: pip install -e \".[real]\"") from error
    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=DRAWS)
    seen: set[str] = set()
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for template, item in zip(problems.task_indices, problems, strict=True):
        question = item["question"].removesuffix(QUESTION_SUFFIX)
        answer = re.sub(r"(\d)\.0\b", r"\1", item["metadata"]["answer_cot"])  # 12.0 apples
        if len(question) > MAX_QUESTION_LENGTH or len(answer) > MAX_ANSWER_LENGTH or question in seen:
            continue
        seen.add(question)
        numbers = re.findall(r"\d+", question)
        found[hash_split(f"{template}: {numbers}")].append(Example(f"{question}\nAnswer:", f" {answer}"))
    return {split: tuple(examples) for split, examples in found.items()}
