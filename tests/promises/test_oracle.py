"""The records of a study that is trained on Ray equal the frozen ones up to the processor's rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_the_records_of_a_trained_study_are_the_frozen_ones(made_once: Callable[..., Path]) -> None:
    found = oracle.trained(made_once("trained", oracle.train))
    stored = oracle.frozen("trained")
    assert {record["state"] for record in stored.values()} == {"finished", "diverged"}
    assert not oracle.differences(found, stored, allowed=oracle.PROCESSORS)
