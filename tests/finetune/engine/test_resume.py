"""A lane that resumes from its checkpoint equals one that was not interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Script, configuration, crash_at, leases, numbers_of, solo, train

from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue
from variants.api import AdaptationScope

NAMES = {
    "letters": [
        n for n in catalogue.names() if catalogue.get(n).adaptation_scope is not AdaptationScope.HEAD_ONLY
    ],
    "reviews": catalogue.names(),
}
"""Task -> variants. `letters` has a language model, `reviews` an encoder whose head every lane trains."""

DEFAULT = {
    ("letters", "adalora"),
    ("letters", "lora"),
    ("letters", "hira"),
    ("reviews", "eva"),
    ("reviews", "full"),
    ("reviews", "head_only"),
    ("reviews", "lora_moe"),
}
"""Variants with hooks, none of them, a dense update, calibration, a group of their own, a head only, and an
auxiliary loss."""


def point(variant: str, task: str) -> Configuration:
    """Return a configuration of eight steps with a checkpoint after every second step. Gradients are clipped
    in every step, so that the parameters depend on the order in which the norm is summed."""
    rule = catalogue.get(variant)
    extra = dict(rule.extra_defaults)
    if "calibration_batches" in extra:
        extra["calibration_batches"] = 2
    one = configuration(
        variant=variant,
        task=task,
        steps=8,
        evaluations=4,
        dropout=0.1 if rule.uses_dropout else 0.0,
        rank=4 if rule.uses_rank else 0,
        alpha=8.0 if rule.uses_alpha else None,
    )
    return replace(
        one,
        variant=replace(one.variant, extra=extra),
        optimizer=replace(one.optimizer, clip_norm=1e-4),
    )


def combinations() -> list[Any]:
    """Return all combinations.

    The slow run has one task for each variant; the tasks alternate. The default run has those of `DEFAULT`.
    """
    found = []
    for task in NAMES:
        for name in NAMES[task]:
            usual = tuple(NAMES)[catalogue.names().index(name) % len(NAMES)]
            is_usual = task == usual or name not in NAMES[usual]
            rest = pytest.mark.slow if is_usual else pytest.mark.nightly
            found.append(pytest.param(task, name, marks=() if (task, name) in DEFAULT else rest))
    return found


@pytest.mark.parametrize(("task", "variant"), combinations())
def test_a_resumed_lane_is_bit_equal(task: str, variant: str, store: Store, tmp_path: Path) -> None:
    one = point(variant, task)
    crash_at(4, [one], store)
    train(Script(leases([one], attempt=2)), store)
    record = store.get(one.fingerprint)
    assert record is not None
    assert record.state == "finished", record.traceback
    assert record.provenance.resumed_from == (4,)
    assert all(step.gradient_norm > 1e-4 for step in record.curve)
    assert numbers_of(record) == numbers_of(solo(one, tmp_path))
