"""Fixtures for the tests of image tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import MAKE


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with a small CLIP and one with a small ViT, by kind."""
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKE.items()}


@pytest.fixture(params=list(MAKE))
def image_folder(request: pytest.FixtureRequest, image_folders: dict[str, Path]) -> Path:
    """Return the folder of each model in turn."""
    return image_folders[request.param]
