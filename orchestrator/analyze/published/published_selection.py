"""Selection of learning rates by test scores, as in the published study (`--select published`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.analyze.results import Summary
from orchestrator.record.schema import Evaluation, Record

MARK = "Selected on the test set, as published (--select published)."
"""The sentence in every verdict of a study whose rates were selected by test scores."""
LABEL = "(selected on the test set)"
"""The text after the base model's name in titles and pictures of such a study."""


def select_published(record: Record) -> Record:
    """Return a copy of a record whose validation scores are its test scores.

    The analysis then selects by test scores, as the published study did. If the test split was scored at
    every evaluation (GLUE), the best of these evaluations counts as the last one. The record has results per
    item of the last evaluation only, so in this case the copy has none.

    Args:
        record: Any record.

    Returns:
        The copy, with `LABEL` after the name of its base model and the fingerprint of `record`.
    """
    metric = record.configuration.task.metric
    tests = [each for each in record.evaluations if each.split == "test"]
    items = {split: record.items[split] for split in record.items if split == "test"}
    if record.configuration.test_evaluations == "every" and tests:
        best = max(tests, key=lambda each: _finite(each.scores.get(metric)))
        tests, items = [*(each for each in tests if each is not best), best], {}
    # Every title and picture shows the model's name. The name is not part of the fingerprint.
    model = replace(record.configuration.model, name=f"{record.configuration.model.name} {LABEL}")
    return replace(
        record,
        configuration=replace(record.configuration, model=model),
        evaluations=(*(_as_validation(each) for each in tests), *tests),
        baseline_scores={split: record.baseline_scores.get("test", {}) for split in ("validation", "test")}
        if record.baseline_scores
        else {},
        items={split: own for own in items.values() for split in ("validation", "test")},
    )


def _as_validation(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, split="validation")


def _finite(score: float | None) -> float:
    return score if score is not None and math.isfinite(score) else -math.inf


def mark_published(summary: Summary, records: Iterable[Record]) -> Summary:
    """Add to a summary's verdicts, and as its first warning, that rates were selected by test scores.

    Args:
        summary: The summary of `records`.
        records: Records from `select_published`.
    """
    best = any(record.configuration.test_evaluations == "every" for record in records)
    of_best = " of the best evaluation of a run" if best else ""
    warning = (
        f"{MARK} Every score called a validation score here is a test score{of_best}, and each rate was "
        "chosen by it, so the scores of the chosen rates are too high; compare them with the published ones, "
        "and with nothing else."
    )
    verdicts = [replace(verdict, design=f"{verdict.design} {MARK}") for verdict in summary.verdicts]
    return replace(summary, verdicts=tuple(verdicts), warnings=(warning, *summary.warnings))
