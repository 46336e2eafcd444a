"""A fixture: a base model in a folder, for tests that load a model and need no scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.finetune.sources.base_store import suppress_transformers_logging
from orchestrator.finetune.tasks.letters import RECIPE, Letters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with the vocabulary of `letters` that was pretrained for one step."""
    folder = tmp_path_factory.mktemp("base") / "m"
    folder.mkdir()
    with suppress_transformers_logging():
        Letters(replace(RECIPE, steps=1)).pretrain(folder, lambda text: None)
    return folder
