"""The first losses of one variant of each kind equal those in golden_curves.json, so a change is noticed.

The rule of a variant has tests of its own; these losses also depend on the task, the loop and the lanes.
After an intended change, raise `numerics` of the variant, the task or the loop, so that old records no longer
count, and write the curves again:

    PYTHONPATH=tests/execution:tests/finetune python tests/finetune/engine/test_golden_curves.py NAMES
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS
from scripted import configuration, solo

from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue
from variants.api import AdaptationScope
from variants.testing.rig import LAW_SETTINGS

FILE = Path(__file__).with_name("golden_curves.json")

CURVES = sorted([*KINDS, "fourier_ft", "ia3", "oft", "sine_lora"])
"""`KINDS`, and the kinds of maps: a matrix of full size, a map of the output, and one of the input."""

ALLOWED = 1e-5
"""The largest relative distance. The kernels of other processors round differently, and the losses are then
less than a tenth of it away."""


def point(variant: str) -> Configuration:
    """Return a configuration of the task `letters`, or `reviews` for a variant that trains a head only.

    It has the variant's settings for small layers and its typical rate. Far above that rate a curve magnifies
    rounding, and far below it a change of code hardly changes the losses.
    """
    chosen = catalogue.get(variant)
    task = "reviews" if chosen.adaptation_scope is AdaptationScope.HEAD_ONLY else "letters"
    alpha = 8.0 if chosen.uses_alpha else None
    rate = 1e-2 * chosen.typical_lr_scale
    c = configuration(variant=variant, alpha=alpha, rate=rate, steps=6, evaluations=1, task=task)
    return replace(c, variant=replace(c.variant, extra=dict(LAW_SETTINGS.get(variant, {}))))


def curve(c: Configuration, folder: Path, **options: Any) -> list[float]:
    record = solo(c, folder, **options)
    assert record.state == "finished", record.traceback
    return [step.loss for step in record.curve]


def distance(c: Configuration, losses: list[float]) -> float:
    """Return the largest relative distance from the stored losses, divided by the allowed one."""
    pairs = zip(losses, json.loads(FILE.read_text())[c.variant.name], strict=True)
    return max(abs(loss / stored - 1) for loss, stored in pairs) / ALLOWED


@pytest.mark.parametrize("variant", CURVES)
def test_the_losses_equal_the_stored_ones(variant: str, store: Store, tmp_path: Path) -> None:
    c = point(variant)
    far = distance(c, curve(c, tmp_path))
    print(f"distance / allowed: {far:.3f} {variant}")  # for .ci/other-cpu
    assert far <= 1


@pytest.mark.parametrize(
    ("variant", "method", "key"),
    [("lora", "factors", "B"), ("sine_lora", "matrix", "A"), ("fourier_ft", "matrix", "entries")],
)
def test_a_factor_that_is_off_by_one_percent_is_seen(
    variant: str, method: str, key: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(type(catalogue.get(variant)), method)

    def wrong(self: object, params: Any, layer: Any) -> Any:
        return right(self, {**params, key: 1.01 * params[key]}, layer)

    monkeypatch.setattr(type(catalogue.get(variant)), method, wrong)
    c = point(variant)
    assert distance(c, curve(c, tmp_path, source_poll_seconds=0.0)) > 2


if __name__ == "__main__":
    import tempfile

    import torch

    torch.set_num_threads(1)
    stored, lines = json.loads(FILE.read_text()), []
    for name in CURVES:
        if name in sys.argv[1:] or name not in stored:
            with tempfile.TemporaryDirectory() as folder:
                stored[name] = [round(x, 7) for x in curve(point(name), Path(folder))]
        lines.append(f'"{name}": {json.dumps(stored[name])}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
