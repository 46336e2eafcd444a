"""The trained study of the tests of the export (see `trained_once` in conftest.py), and its model cards."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

STUDY = "rates"
RATES = {"lora": ("1e-4", "1e-2"), "hydra_lora": ("1e-2",), "full": ("1e-3",)}


@dataclass(frozen=True)
class Trained:
    """The study `rates` in its output folder."""

    output: Path

    @property
    def store(self) -> Store:
        return Store(self.output / "store")

    def record(self, variant: str, which: int = -1) -> Record:
        """Return the record of a variant with its lowest rate (0) or its highest one (-1)."""
        own = [r for r in self.store.records() if r.configuration.variant.name == variant]
        return sorted(own, key=lambda r: r.configuration.optimizer.learning_rate)[which]

    def rescore(self, variant: str, which: int, validation: float) -> Record:
        """Give a record another score at the end of training, and return it."""
        record = self.record(variant, which)
        *earlier, last = [each for each in record.evaluations if each.split == "validation"]
        last = replace(last, scores={**last.scores, "exact_match": validation})
        tests = [each for each in record.evaluations if each.split != "validation"]
        self.store.record_path(record.fingerprint).unlink()
        assert self.store.put(replace(record, evaluations=(*earlier, last, *tests)))
        return self.record(variant, which)

    def adapter(self, variant: str) -> Path:
        path = self.store.find_adapter(self.record(variant).fingerprint)
        assert path is not None
        return path


def changed(record: Record, **changes: Any) -> Record:
    """Return a record of another lane.

    Args:
        record: The record to change.
        **changes: Fields of the record; `seed`, and names that the record lacks, are fields of its
            configuration.
    """
    own = {name: value for name, value in changes.items() if hasattr(record, name) and name != "seed"}
    rest = {name: value for name, value in changes.items() if name not in own}
    configuration = replace(record.configuration, **rest)
    return replace(record, configuration=configuration, fingerprint=configuration.fingerprint, **own)


def run_card(folder: Path, text: str = "unk a c b d e =") -> dict[str, Any]:
    """Run the Python lines in the README.md of an export, with a text as input, and return the variables."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert blocks
    variables: dict[str, Any] = {}
    for code in blocks:
        exec(code.replace("FOLDER", str(folder)).replace("INPUT", text), variables)
    return variables
