"""Grade-school math problems with worked answers, from reasoning-gym's `gsm_symbolic`.

The generator follows GSM-Symbolic (arXiv 2410.05229). It has 85 templates, each made from one problem of
GSM8K; the task uses the 39 whose question and answer are short. Held-out problems have the same templates
as training problems and other numbers. So a score shows that the model applies a known solution, not that
it finds one: SmolLM2-135M does not learn to solve problems of new templates (docs/real_tasks.md).
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
"""In characters: short problems are trained on within minutes on a CPU."""
QUESTION_SUFFIX = " Give the result as your final answer. Do not include units."
"""The end of every question of the package, which is removed."""


class GsmSymbolic(Task):
    """Solving grade-school problems of known templates."""

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
    """Return the distinct short problems among the first DRAWS of the generator, in its order."""
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
