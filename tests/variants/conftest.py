"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed PyTorch, so that a test gets the same random numbers whichever tests ran before it."""
    torch.manual_seed(0)
