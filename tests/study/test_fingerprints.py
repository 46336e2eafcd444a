"""Fingerprints do not change, so that records of an earlier version are found again.

`tests/data/fingerprints.json` lists resolved configurations with their fingerprints and group keys. For an
intended change, raise one of the `numerics` numbers and write the file again with this command:

    python tests/study/test_fingerprints.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from variants import catalogue

FILE = Path(__file__).parents[1] / "data" / "fingerprints.json"
TASKS = ("letters", "reviews", "digits")
WITHOUT_HEAD = tuple(name for name in catalogue.names() if name != "head_only")
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

    Args:
        bases: An empty folder, so that no base model is prepared and all count as having the same content.
    """
    for task in TASKS:
        for name, options in OPTIONS.items():
            variants = catalogue.names() if tasks.get(task).has_head else WITHOUT_HEAD
            typed = StudyOptions(task=task, variants=variants, **options)
            chosen = resolve_options(typed, task, (), bases)
            for configuration in build_configuration_templates(
                typed, chosen, model_catalogue.UNPREPARED, bases
            ):
                yield f"{task} {name} {configuration.variant.name}", configuration


def test_fingerprints_and_group_keys_are_those_of_the_committed_list(tmp_path: Path) -> None:
    found = {name: [c.fingerprint, c.group_key] for name, c in configurations(tmp_path)}
    assert found == json.loads(FILE.read_text())


if __name__ == "__main__":
    made = {name: [c.fingerprint, c.group_key] for name, c in configurations(Path("no-folder-of-bases"))}
    FILE.write_text(json.dumps(made, indent=0) + "\n")
