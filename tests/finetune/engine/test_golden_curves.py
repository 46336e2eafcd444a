"""The first losses of every variant equal the losses in golden_curves.json, so a change is noticed.

After an intended change, raise `numerics` of the variant, the task or the loop, so that old records no longer
count, and add the missing curves:

    PYTHONPATH=tests/execution:tests/finetune python tests/finetune/engine/test_golden_curves.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import configuration, solo

from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue
from variants.api import AdaptationScope

FILE = Path(__file__).with_name("golden_curves.json")


def point(variant: str) -> Configuration:
    """Return a configuration of the task `letters`, or `reviews` for a variant that trains a head only."""
    chosen = catalogue.get(variant)
    task = "reviews" if chosen.adaptation_scope is AdaptationScope.HEAD_ONLY else "letters"
    alpha = 8.0 if chosen.uses_alpha else None
    return configuration(variant=variant, alpha=alpha, steps=6, evaluations=1, task=task)


def numerics(c: Configuration) -> str:
    return f"variant {catalogue.get(c.variant.name).numerics}, task {c.task.numerics}, loop {c.loop_numerics}"


def curve(c: Configuration, folder: Path) -> list[float]:
    record = solo(c, folder)
    assert record.state == "finished", record.traceback
    return [step.loss for step in record.curve]


@pytest.mark.parametrize("variant", catalogue.names())
def test_the_losses_equal_those_stored_for_these_numerics(variant: str, store: Store, tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text()).get(variant, {})
    c = point(variant)
    assert numerics(c) in golden, f"no golden curve of {variant} with {numerics(c)}: see the top of this file"
    assert curve(c, tmp_path) == pytest.approx(golden[numerics(c)], rel=1e-4)


if __name__ == "__main__":
    import tempfile

    import torch

    torch.set_num_threads(1)
    stored = json.loads(FILE.read_text())
    curves = {name: stored.get(name, {}) for name in catalogue.names()}
    for name in catalogue.names():
        if numerics(point(name)) not in curves[name]:
            with tempfile.TemporaryDirectory() as folder:
                curves[name][numerics(point(name))] = [round(x, 7) for x in curve(point(name), Path(folder))]
    FILE.write_text(json.dumps(curves, indent=1) + "\n")
