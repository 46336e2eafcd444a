"""Promise 8: at least 69 variants and two controls name their sources, train, and start where they say.

A user's variant is checked with the laws. tests/contract and tests/variants check the equations.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import as_a_user
import pytest
import tiny_models
from forked_commands import Commands

STEPS = 3
SAMPLE = 6
"""Number of variants, drawn with a fixed seed, whose adapters are compared with PEFT."""
LABELS = ("ham", "spam")


def catalogue() -> dict[str, dict[str, Any]]:
    """Return the output of `python -m variants --json`: name -> entry."""
    command = [sys.executable, "-m", "variants", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {entry["name"]: entry for entry in json.loads(printed)}


def mails() -> list[tuple[str, str, str]]:
    """Return rows of a text, a label and a split."""
    texts = [" ".join(letters) for letters in product("abcd", "efgh", "ijkl")]
    splits = ("train", "train", "validation", "test")
    return [(text, LABELS[text[0] in "ab"], splits[number % 4]) for number, text in enumerate(texts)]


def train_all(folder: Path, model: Path) -> None:
    """Train each variant for a few steps, at one rate, on a model of a few thousand weights."""
    lines = [",".join(row) for row in [("text", "label", "split"), *mails()]]
    (folder / "mails.csv").write_text("\n".join(lines) + "\n")
    options = ["--data", "mails.csv", "--model", str(model), "--study", "all", "--save-adapters", "all"]
    options += ["--learning-rates", "1e-3", "--widen", "0", "--seeds", "1", "--rank", "4"]
    options += ["--steps", str(STEPS), "--set", "warmup=0", "--evaluations", "1", "--trainers", "1"]
    print(as_a_user.succeed("study", "--dry-run", *options, "--variants", *catalogue(), cwd=folder))


@pytest.fixture(scope="module")
def trained(made_once: Callable[..., Path]) -> Path:
    """Return the working folder of a study of all variants. Tests only read it."""
    model = made_once("wide-bert", lambda folder: print(tiny_models.bert(folder, width=64)))
    return made_once("all-variants", lambda folder: train_all(folder, model))


@pytest.fixture(scope="module")
def of_variant(trained: Path) -> dict[str, dict[str, Any]]:
    """Return variant -> record."""
    return {r["configuration"]["variant"]["name"]: r for r in as_a_user.records(trained).values()}


def test_the_catalogue_names_its_variants_with_paper_and_year_and_two_controls() -> None:
    entries = catalogue()
    controls = {name for name, entry in entries.items() if entry["is_control"]}
    assert controls == {"full", "head_only"}
    assert len(entries) >= 69 + 2
    for name in entries.keys() - controls:
        entry = entries[name]
        assert entry["title"], name
        assert entry["paper"], name
        assert re.search(r"\b(19|20)\d\d\b", f"{entry['authors']} {entry['paper']}"), name


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_variant_trains_to_its_last_step(of_variant: dict[str, dict[str, Any]]) -> None:
    assert of_variant.keys() == catalogue().keys()
    for name, record in of_variant.items():
        assert record["state"] == "finished", (name, record["reason"])
        assert [step["step"] for step in record["curve"]] == [*range(1, STEPS + 1)], name
        assert all(math.isfinite(step["loss"]) for step in record["curve"]), name
        assert record["curve"][0]["loss"] != record["curve"][-1]["loss"], name


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_variant_that_starts_at_the_base_model_has_its_loss(of_variant: dict[str, dict[str, Any]]) -> None:
    """The loss of step 1 is computed before the first update: it is that of the base model and a new head."""
    base = of_variant["head_only"]["curve"][0]["loss"]
    starts = {name: entry["start"] for name, entry in catalogue().items()}
    first = {name: record["curve"][0]["loss"] for name, record in of_variant.items()}
    assert {name for name in first if starts[name] != "other" and first[name] != pytest.approx(base)} == set()
    elsewhere = [name for name in first if starts[name] == "other" and first[name] != pytest.approx(base)]
    assert len(elsewhere) > 3, "the loss tells a start at the base model from another one"


@pytest.fixture(scope="module")
def commands(trained: Path) -> Iterator[Commands]:
    """Yield a process that runs exports."""
    made = Commands(["export", "all", "--variant", "lora", "--to", "first"], folder=trained)
    yield made
    made.close()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_adapters_load_in_peft_and_give_the_scores_of_their_records(
    trained: Path, commands: Commands, of_variant: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    possible = sorted(name for name, entry in catalogue().items() if entry["exports"]["peft"]["possible"])
    rows = [(text, LABELS.index(label)) for text, label, split in mails() if split == "test"]
    for name in random.Random(8).sample(possible, SAMPLE):
        folder = tmp_path / name
        result = commands.run("export", "all", "--variant", name, "--to", folder, cwd=trained)
        assert result.code == 0, result
        assert (folder / "adapter_config.json").exists()
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS)).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer([text for text, _ in rows], return_tensors="pt")
        labels = torch.tensor([label for _, label in rows])
        with torch.no_grad():
            logits = model(**inputs).logits
        (recorded,) = [each["scores"] for each in of_variant[name]["evaluations"] if each["split"] == "test"]
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert loss == pytest.approx(recorded["loss"], rel=1e-4), name
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        assert accuracy == pytest.approx(recorded["accuracy"]), name


# -- the laws ------------------------------------------------------------------------------------------------

OWN = Path(__file__).with_name("gained.py").read_text()
BROKEN = {
    "count": (
        "layer.ones(layer.shape[0], 1)",
        "layer.ones(layer.shape[0] if layer.weight.is_meta else 1, 1)",
    ),
    "start": ("return initial", 'initial.trainable["B"] += 0.1; return initial'),
    "merge": (
        "    def factors",
        "    def delta_weight(self, params, _):\n        return params['B'] @ params['A']\n\n    def factors",
    ),
    "gradient": ('params["g"] * params["B"]', 'params["g"].detach() * params["B"]'),
}
"""Part of the name of a law -> a text of the variant's file, and the replacement that breaks the law."""


def check(folder: Path, text: str) -> None:
    """Check the laws of a user's variant as docs/variants.md says, for the first case only."""
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
