"""What the tests of faults compare with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import study

from orchestrator.record.schema import Record


@pytest.fixture(scope="session")
def undisturbed(letters_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The records of `study.EIGHT`, trained without any fault, by fingerprint."""
    output = tmp_path_factory.mktemp("undisturbed") / "results"
    shutil.copytree(letters_bases, output / "store" / "bases")
    code, out, err = study.end(study.start(output, *study.EIGHT), timeout=400)
    assert code == 0, out + err
    return study.records(output)
