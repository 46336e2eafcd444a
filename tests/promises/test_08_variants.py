"""67 variants and two controls are named with their sources.

A variant of a user is checked with the laws. Equations are checked in tests/contract and tests/variants.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def catalogue() -> dict[str, dict[str, Any]]:
    """Return what `python -m variants --json` says, by name."""
    command = [sys.executable, "-m", "variants", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {entry["name"]: entry for entry in json.loads(printed)}


def test_the_catalogue_names_67_variants_with_paper_and_year_and_two_controls() -> None:
    entries = catalogue()
    controls = {name for name, entry in entries.items() if entry["is_control"]}
    assert controls == {"full", "head_only"}
    assert len(entries) == 67 + 2
    for name in entries.keys() - controls:
        entry = entries[name]
        assert entry["title"], name
        assert entry["paper"], name
        assert re.search(r"\b(19|20)\d\d\b", f"{entry['authors']} {entry['paper']}"), name


# -- the laws ------------------------------------------------------------------------------------------------

OWN = """
from variants import api
from variants.baseline.lora import LoRA


class Gained(LoRA):
    parameters = "rank * (in + out) + out"
    hyperparameters = {"start": api.Number(1.0, above=0, help="initial gain")}

    def init(self, layer, random):
        initial = random.lora()
        initial.trainable["g"] = layer.settings["start"] * layer.ones(layer.shape[0], 1)
        return initial

    def factors(self, params, layer):
        return params["A"], params["g"] * params["B"]
"""

BROKEN = {
    "count": ('"rank * (in + out) + out"', '"rank * (in + out)"'),
    "start": ("return initial", 'initial.trainable["B"] += 0.1; return initial'),
    "merge": (
        "    def factors",
        "    def delta_weight(self, params, _):\n        return params['B'] @ params['A']\n\n    def factors",
    ),
    "gradient": ('params["g"] * params["B"]', 'params["g"].detach() * params["B"]'),
}
"""A word of the name of the law -> a text of the variant's file, and what takes its place."""


def check(folder: Path, text: str) -> None:
    """Check a user's variant with the laws, as docs/variants.md says, on the first case."""
    from variants import catalogue
    from variants.testing import CASES, check_laws

    (folder / "gained.py").write_text(text)
    check_laws(catalogue.get(str(folder / "gained.py")), CASES[:1])


def test_the_check_of_the_laws_passes_a_users_variant(tmp_path: Path) -> None:
    check(tmp_path, OWN)


@pytest.mark.parametrize("case", BROKEN)
def test_the_check_of_the_laws_names_the_law_that_a_variant_breaks(case: str, tmp_path: Path) -> None:
    old, new = BROKEN[case]
    assert OWN.count(old) == 1
    with pytest.raises(AssertionError, match=rf"gained\.py breaks \w*{case}"):
        check(tmp_path, OWN.replace(old, new))
