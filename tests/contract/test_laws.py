"""Every variant of the catalogue passes every law on every case.

The default run has a pairwise cover of this product; the rest of it is marked `slow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from laws import LAWS, OWN_LANES, check, concerns
from rig import CASES, Case

from variants import catalogue


def traits(law: str, cases: Iterable[Case]) -> set[tuple[str, object]]:
    """Return the values in `cases` that the default run pairs with `law`."""
    found: set[tuple[str, object]] = set()
    for case in cases:
        found |= {("model", case.model), ("dtype", case.dtype)}
        if law not in OWN_LANES:
            found.add(("several lanes", case.lanes > 1))
        if case.model in ("rig", "headed"):  # the other models have shapes and biases of their own
            found |= {("tall", case.out > case.inside), ("bias", case.bias)}
    return found


@cache
def cover(law: str, cases: tuple[Case, ...], first: Case) -> tuple[Case, ...]:
    """Return the fewest of `cases` that include `first` and have all traits of `cases`."""
    choices = ((first, *more) for size in range(len(cases)) for more in combinations(cases, size))
    return next(chosen for chosen in choices if traits(law, chosen) == traits(law, cases))


def concerned(law: str, name: str) -> tuple[Case, ...]:
    return tuple(case for case in CASES if concerns(LAWS[law], catalogue.get(name), case))


def parameters() -> Iterator[Any]:
    """Yield the whole product; another case comes first in each variant's and law's cover."""
    for i, name in enumerate(catalogue.names()):
        # The workers of pytest-xdist may share this file: it has no fixtures that each of them would make.
        group = pytest.mark.xdist_group(f"laws-{name}")
        for j, law in enumerate(LAWS):
            cases = concerned(law, name)
            default = cover(law, cases, cases[(i + j) % len(cases)])
            for case in cases:
                marks = [group] if case in default else [group, pytest.mark.slow]
                yield pytest.param(name, case, law, id=f"{name}-{case.name}-{law}", marks=marks)


PARAMETERS = list(parameters())


@pytest.mark.parametrize(("name", "case", "law"), PARAMETERS)
def test_law(name: str, case: Case, law: str) -> None:
    check(LAWS[law], catalogue.get(name), case)


def test_the_default_run_is_a_pairwise_cover_and_the_slow_cases_are_the_rest_of_the_product() -> None:
    names = catalogue.names()
    product = [(name, case, law) for name in names for law in LAWS for case in concerned(law, name)]
    assert [each.values for each in PARAMETERS] == product
    default = {each.values for each in PARAMETERS if "slow" not in {mark.name for mark in each.marks}}
    for name in names:
        for law in LAWS:
            chosen = [case for case in CASES if (name, case, law) in default]
            assert traits(law, chosen) == traits(law, concerned(law, name)), f"{name}, {law}"
    pairs = {(case, law) for _, case, law in product}
    assert {(case, law) for _, case, law in default} == pairs, "a case that no variant meets by default"
