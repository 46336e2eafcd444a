"""What several folders of tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("busy")

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two cores: threads of several processes get in each other's way


@pytest.fixture(scope="session")
def letters_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `bases` folder with the pretrained base of the letters task: made once a session, about 30 s."""
    from orchestrator.finetune import models

    root = tmp_path_factory.mktemp("bases")
    models.prepare("letters-base", root, lambda text: None)
    return root


@pytest.fixture
def output(letters_bases: Path, tmp_path: Path) -> Path:
    """An output folder whose store has the letters base already."""
    shutil.copytree(letters_bases, tmp_path / "results" / "store" / "bases")
    return tmp_path / "results"
