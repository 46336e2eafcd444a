"""Configurations as a study resolves them from its options, and small base models for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.finetune.models.catalogue import prepare_base_model
from orchestrator.finetune.resolve.option_names import ResolvedOptions, resolve_tasks
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.finetune.tasks.letters import Letters
from orchestrator.finetune.tasks.pretraining import Recipe
from orchestrator.finetune.tasks.reviews import Reviews
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions


def resolve_one_task(options: StudyOptions, bases: Path) -> tuple[ResolvedOptions, list[Configuration]]:
    """Resolve the options of a study on one task, and return them with its templates."""
    (chosen,) = resolve_tasks(options, bases)
    content = prepare_base_model(chosen.model, bases, lambda text: None)
    return chosen, build_configuration_templates(options, chosen, content, bases)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small base models of the tasks `letters` and `reviews`."""
    root = tmp_path_factory.mktemp("bases")
    small = Recipe(1, 2, 1e-3, hidden_size=16, intermediate_size=32, layers=1, heads=2)
    for task in (Letters(small), Reviews(small)):
        (root / task.name).mkdir()
        task.pretrain(root / task.name, lambda text: None)
    return root
