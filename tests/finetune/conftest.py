"""Fixtures of the tests of fine-tuning: one thread, an empty store, and a pair of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.store import Store
from variants.testing.rig import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Return `Pair.run` of pair.py. Test files that use it are one pytest-xdist group and share the pair."""
    from pair import started

    with started(tmp_path_factory.mktemp("pair")) as run:
        yield run
