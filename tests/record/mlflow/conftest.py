"""Fixtures of the tests that log to a real MLflow on SQLite."""

from __future__ import annotations

import pytest
from mlflow_server import empty_database


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create one database for all tests of a module, each of which has its own study."""
    return empty_database(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """Return a study's name, which no other test has."""
    return request.node.name
