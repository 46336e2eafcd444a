"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test the same random numbers whichever tests its process ran before."""
    torch.manual_seed(0)
