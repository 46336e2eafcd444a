"""Every variant of the catalogue passes every law, on every case."""

from __future__ import annotations

import pytest
from laws import LAWS, check, concerns
from rig import CASES, Case

from variants import catalogue

ALL = [
    pytest.param(name, case, law, id=f"{name}-{case.name}-{law}")
    for name in catalogue.names()
    for case in CASES
    for law in LAWS
    if concerns(LAWS[law], case)
]


@pytest.mark.parametrize(("name", "case", "law"), ALL)
def test_law(name: str, case: Case, law: str) -> None:
    check(LAWS[law], catalogue.get(name), case)
