"""Checks of the name and folder of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.record.store import Store
from orchestrator.study import names
from orchestrator.util.errors import UsageError


@pytest.mark.parametrize("store", ["out", ".", "out/store"])
def test_a_study_folder_may_be_beside_the_folders_of_a_store_but_not_inside_them(
    store: str, tmp_path: Path
) -> None:
    made = Store(tmp_path / store)
    output = tmp_path / "out"
    assert names.resolve_study_folder("mine", output, made.root) == output / "mine"
    own = {path.name for path in vars(made).values() if isinstance(path, Path)} - {made.root.name}
    assert own >= {"records", "bases"}
    for name in own:
        with pytest.raises(UsageError, match="one of the store's own"):
            names.resolve_study_folder(name, made.root, made.root)
    with pytest.raises(UsageError, match="one of the store's own"):
        names.resolve_study_folder(made.root.name, made.root.parent, made.root)
