"""Grade-school math problems with worked answers, from reasoning-gym's `gsm_symbolic`.

The generator follows GSM-Symbolic (arXiv 2410.05229). It has 85 templates, each made from one problem of
GSM8K; the task uses the 39 whose question and answer are short. Held-out problems have the same templates
as training problems and other numbers. So a score shows that the model applies a known solution, not that
it finds one: SmolLM2-135M does not learn to solve problems of new templates (docs/real_tasks.md).
"""

from __future__ import annotations

import re
from functools import lru_cache

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.examples import split_by_key
from orchestrator.finetune.tasks.reasoning_gym_data import create_dataset

DRAWS = 12_000
MAX_QUESTION_LENGTH, MAX_ANSWER_LENGTH = 240, 220
"""In characters: short problems are trained on within minutes on a CPU."""
QUESTION_SUFFIX = " Give the result as your final answer. Do not include units."
"""The end of every question of the package, which is removed."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class GsmSymbolic(Task):
    """Solving grade-school problems of known templates."""

    name = "gsm_symbolic"
    title = "grade-school problems of known templates (reasoning-gym)"
    floor = 0.0
    default_model = "smollm2-135m"
    max_new_tokens = 90
    grade_at = "last_evaluation"
    defaults = TaskDefaults(
        1200, 200, 200, steps=150, batch_size=8, max_length=160, evaluations=3, learning_rates=LEARNING_RATES
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return _all_examples()[split][:count]

    def grade(self, example: Example, answer: str) -> float:
        from orchestrator.finetune.grading import math

        return math.grade(answer, example.answer)


@lru_cache(maxsize=1)
def _all_examples() -> dict[Split, list[Example]]:
    """Return the distinct short problems among the first DRAWS of the generator, in its order."""
    problems = create_dataset("gsm_symbolic", DRAWS)
    keyed_examples: dict[str, tuple[str, Example]] = {}
    for template, item in zip(problems.task_indices, problems, strict=True):
        question = item["question"].removesuffix(QUESTION_SUFFIX)
        answer = re.sub(r"(\d)\.0\b", r"\1", item["metadata"]["answer_cot"])  # 12.0 apples
        if len(question) <= MAX_QUESTION_LENGTH and len(answer) <= MAX_ANSWER_LENGTH:
            numbers = re.findall(r"\d+", question)
            example = Example(f"{question}\nAnswer:", f" {answer}")
            keyed_examples.setdefault(question, (f"{template}: {numbers}", example))
    return split_by_key(keyed_examples.values())
