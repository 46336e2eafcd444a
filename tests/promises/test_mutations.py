"""Each mutation of `mutations.py` changes one place of the program and names a test that exists."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_and_names_a_test(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    file, _, name = mutation.test.partition("::")
    tree = ast.parse((ROOT / "tests" / "promises" / file).read_text())
    assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_promise_has_three_mutations() -> None:
    promises = Counter(mutation.test.partition("_")[2][:2] for mutation in MUTATIONS)
    assert {f"{number:02}" for number in range(1, 14)} <= promises.keys()
    assert min(promises.values()) >= 3
