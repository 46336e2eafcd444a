"""Where a study's folder may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.record.store import Store
from orchestrator.study import study_name
from orchestrator.util.errors import BadInput


@pytest.mark.parametrize("store", ["out", ".", "out/store"])
def test_studies_may_lie_beside_the_folders_of_a_store_and_not_in_them(store: str, tmp_path: Path) -> None:
    made = Store(tmp_path / store)
    output = tmp_path / "out"
    assert study_name.folder("mine", output, made.root) == output / "mine"
    own = {path.name for path in vars(made).values() if isinstance(path, Path)} - {made.root.name}
    assert own >= {"records", "bases"}
    for name in own:
        with pytest.raises(BadInput, match="one of the store's own"):
            study_name.folder(name, made.root, made.root)
    with pytest.raises(BadInput, match="one of the store's own"):
        study_name.folder(made.root.name, made.root.parent, made.root)


def test_a_name_of_the_most_bytes_has_room_for_a_stages_ending(tmp_path: Path) -> None:
    name = "x" * study_name.MOST_BYTES
    study_name.check(name)
    assert study_name.folder(f"{name}-confirm", tmp_path, tmp_path / "store").name == f"{name}-confirm"
    with pytest.raises(BadInput, match="1 to 200 bytes"):
        study_name.check(f"{name}x")
