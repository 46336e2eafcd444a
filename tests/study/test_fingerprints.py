"""Fingerprints do not change, so that a store's records are found again.

`tests/data/fingerprints.json` lists resolved configurations with their fingerprints and group keys. For an
intended change, raise one of the `numerics` numbers and write the file again with this command:

    python tests/study/test_fingerprints.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

FILE = Path(__file__).parents[1] / "data" / "fingerprints.json"
TASKS = ("reviews", "letters", "digits")
VARIANTS = ("eva", "fourier_ft", "full", "head_only", "lora", "rslora", "vb_lora", "vera")
"""One of each kind of settings: without a rank, an alpha, or layers; with own ones; fitted to the layers."""
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "others": {
        "rank": 4,
        "alpha": 4.0,
        "dropout": 0.1,
        "steps": 20,
        "evaluations": 2,
        "batch_size": 8,
        "accumulation": 2,
        "lr_schedule": "linear",
        "dtype": "bfloat16",
    },
}


def configurations(bases: Path) -> Iterator[tuple[str, Configuration]]:
    """Yield resolved configurations of tasks without downloaded data, each with a unique name.

    Each of `VARIANTS` is there once, and LoRA on other tasks and with other options.

    Args:
        bases: An empty folder, so that no base model is prepared and all count as having the same content.
    """
    for task, (name, options) in product(TASKS, OPTIONS.items()):
        is_first = (task, name) == (TASKS[0], "defaults")
        typed = StudyOptions(task=task, variants=VARIANTS if is_first else ("lora",), **options)
        chosen = resolve_options(typed, task, bases)
        for found in build_configuration_templates(typed, chosen, model_catalogue.UNPREPARED, bases):
            yield f"{task} {name} {found.variant.name}", found


def listed(bases: Path) -> dict[str, str]:
    """Return name -> fingerprint and group key of each configuration."""
    return {name: f"{c.fingerprint[:16]} {c.group_key}" for name, c in configurations(bases)}


def test_fingerprints_and_group_keys_are_those_of_the_committed_list(tmp_path: Path) -> None:
    assert listed(tmp_path) == json.loads(FILE.read_text())


if __name__ == "__main__":
    FILE.write_text(json.dumps(listed(Path("no-folder-of-bases")), indent=0) + "\n")
