"""Fixtures of the tests of fine-tuning: one thread, an empty store, and a pair of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.record.store import Store


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Return `Pair.run` of pair.py. Test files that use it are one pytest-xdist group and share the pair."""
    from pair import started

    with started(tmp_path_factory.mktemp("pair")) as run:
        yield run
