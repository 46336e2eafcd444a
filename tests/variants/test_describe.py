"""`python -m variants`: the catalogue as text and JSON, an entry, the taxonomy, the tables of the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from variants import catalogue
from variants.__main__ import main
from variants.api import VariantSettings
from variants.describe import describe
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes
from variants.traits import Traits


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_the_catalogue_lists_every_entry_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line and line[0].islower()} >= set(catalogue.names())
    lora = next(number for number, line in enumerate(lines) if line.startswith("lora "))
    assert lines[lora].split()[1:5] == ["65,536", "batched", "yes", "PEFT"]
    assert lines[lora + 1].strip() == "LoRA (arXiv 2106.09685): rank * (in + out)"


def test_json_has_an_object_for_each_entry(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "--json"))
    assert {each["name"] for each in found} == set(catalogue.names())
    lora = next(each for each in found if each["name"] == "lora")
    assert (lora["axis"], lora["checked"], lora["paper"]) == (
        "baseline", "reference_implementation", "arXiv 2106.09685",
    )  # fmt: skip
    assert json.loads(output(capsys, "--json", "lora")) == lora


@pytest.mark.parametrize("name", catalogue.names())
def test_each_entry_has_a_title_a_summary_and_an_explanation(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = describe(name)
    assert entry.title
    assert entry.summary
    assert entry.is_control or (entry.authors and entry.paper and entry.initialization)
    text = output(capsys, name)
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert f"--variants {'' if name == 'lora' else 'lora '}{name}" in text.splitlines()[-1]
    for own in entry.hyperparameters:
        assert f"{own.name} = " in text
        assert own.help, f"{name}: {own.name} has no help"


def test_counts_are_those_of_the_tensors() -> None:
    """The law compares the formulas with the tensors; this compares the number that is shown with them."""
    case = Case("square", out_features=64, in_features=64, lanes=1)
    for name in ("lora", "dora", "vera"):
        adapters = attach_lanes(case, catalogue.get(name), 1, VariantSettings(rank=8, alpha=16.0))
        layer = next(iter(adapters.layers))
        count = sum(t.numel() for key, t in adapters.trainable("0").items() if key.startswith(f"{layer}."))
        entry = describe(name)
        assert entry.parameter_count is not None
        scaled = {"lora": 8 * 2 * 64, "dora": 8 * 2 * 64 + 64, "vera": 256 + 64}[name]
        assert count == scaled
        assert entry.parameter_count == {"lora": 65536, "dora": 69632, "vera": 4352}[name]
    # A variant without a formula: a matrix (64, 64), and factors (64, 8) and (8, 64).
    assert not describe("lokr").parameters
    assert describe("lokr").parameter_count == 64 * 64 + 2 * 8 * 64


def test_a_name_with_dashes_is_known_and_an_unknown_one_gets_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert output(capsys, "lora-plus") == output(capsys, "lora_plus")
    assert main(["loraplus"]) == 2
    assert "Did you mean 'lora_plus'?" in capsys.readouterr().err
    assert main(["lora", "--taxonomy"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_taxonomy_names_entries_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--taxonomy")
    assert max(map(len, text.splitlines())) <= 80
    assert "ec LoRA+ (arXiv 2402.12354) -> lora_plus" in text
    assert "QLoRA (arXiv 2305.14314) LoRA over a base model in 4 bits" in text
    found = json.loads(output(capsys, "--taxonomy", "--json"))
    assert sum(each["survey_code"] for each in found) == 54


def test_what_is_kept_of_the_variants_is_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traits decide fingerprints, so they are the same after they were written and read again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        catalogue._built_in_traits.cache_clear()
        for name in catalogue.built_in_names():
            assert catalogue.traits(name) == Traits.of(catalogue.get(name))
    (tmp_path / "lora-orchestrator" / "traits.json").write_text('{"sources": ')
    catalogue._built_in_traits.cache_clear()
    assert catalogue.traits("lora").uses_rank
