"""`python -m variants`: the catalogue as text and JSON, an entry, the taxonomy, the forms of export."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from variants import catalogue
from variants.__main__ import (
    count_parameters,
    describe,
    export_forms,
    main,
    vllm_obstacle,
)
from variants.api import RANK_MASK, FrozenLayer, InitialTensors, LayerRandom, VariantSettings
from variants.baseline.lora import LoRA
from variants.storage import save_peft
from variants.testing.rig import CASES, Case, attach_lanes


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_the_catalogue_lists_every_entry_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line and line[0].islower()} >= set(catalogue.names())
    lora = next(number for number, line in enumerate(lines) if line.startswith("lora "))
    assert lines[lora].split()[1:5] == ["2,097,152", "batched", "yes", "PEFT"]
    assert lines[lora + 1].strip() == "LoRA (arXiv 2106.09685): W' = W + s B A, with s = alpha / rank"


def test_json_has_an_object_for_each_entry(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "--json"))
    assert {each["name"] for each in found} == set(catalogue.names())
    lora = next(each for each in found if each["name"] == "lora")
    assert (lora["axis"], lora["checked"], lora["authors"], lora["paper"]) == (
        "baseline", "reference_implementation", "Hu et al. 2021", "arXiv 2106.09685",
    )  # fmt: skip
    assert json.loads(output(capsys, "--json", "lora")) == lora


@pytest.mark.parametrize("name", catalogue.names())
def test_each_entry_has_a_title_a_summary_and_an_explanation(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = describe(name)
    assert entry["title"]
    assert entry["summary"]
    assert entry["is_control"] or (entry["authors"] and entry["paper"])
    text = output(capsys, name)
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert f"--variants {'' if name == 'lora' else 'lora '}{name}" in text.splitlines()[-1]
    for own in entry["hyperparameters"]:
        assert f"{own['name']} = " in text
        assert own["help"], f"{name}: {own['name']} has no help"


SQUARE = Case("square", out_features=64, in_features=64, lanes=1)


@pytest.mark.parametrize("name", sorted({*catalogue.built_in_names()} - {"full", "head_only"}))
def test_the_count_without_weights_is_that_of_a_lane(name: str) -> None:
    variant = catalogue.get(name)
    adapters = attach_lanes(SQUARE, variant, 1)
    shapes = {layer: each.frozen_layer.shape for layer, each in adapters.layers.items()}
    tensors, masks = adapters.trainable("0"), adapters.frozen("0")
    counts: Counter[str] = Counter()
    for key, tensor in tensors.items():
        owner = key.rpartition(".")[0]
        mask = masks.get(f"{owner}.{RANK_MASK}")
        in_use = 1.0 if mask is None else adapters.settings.rank / mask.numel()
        counts[owner] += round(tensor.numel() * in_use)
    assert count_parameters(variant, adapters.settings, shapes) == counts.total()
    if not any(key.endswith(f".{RANK_MASK}") for key in masks):
        assert adapters.parameter_count("0") == counts.total()


def test_parameters_of_known_size() -> None:
    """Formulas of the papers, at the size that is shown: 32 layers of 4096 x 4096 at rank 8."""
    expected = {
        "lora": 32 * 8 * 2 * 4096,
        "dora": 32 * (8 * 2 * 4096 + 4096),
        "vera": 32 * (256 + 4096),
        "lokr": 32 * (64 * 64 + 2 * 8 * 64),
        "oft": 32 * 4096 * 31 // 2,
        "tied_lora": 32 * (8 + 4096) + 8 * 2 * 4096,
        "vb_lora": 32 * 8 * 2 * 16 * 256 + 256 * 256,
        "mola": 8 * 20 * (8 * 2 * 4096 + 4096),
        "adalora": 32 * 8 * (2 * 4096 + 1),
        "full": None,
        "head_only": None,
    }
    assert {name: describe(name)["parameter_count"] for name in expected} == expected


def test_a_count_that_depends_on_the_weight_is_not_shown() -> None:
    assert count_parameters(NeedsValues(), VariantSettings(), {"x": (8, 8)}) is None


class NeedsValues(LoRA):
    """The rank follows from the values of the weight."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        return random.lora(int(layer.weight.count_nonzero()))


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
            for trait, value in catalogue.traits(name).items():
                assert value == getattr(catalogue.get(name), trait)
    (tmp_path / "lora-orchestrator" / "traits.json").write_text('{"sources": ')
    catalogue._built_in_traits.cache_clear()
    assert catalogue.traits("lora")["uses_rank"]


LORA = {"peft_type": "LORA", "r": 16, "bias": "none", "use_dora": False, "modules_to_save": None}


@pytest.mark.parametrize(
    ("fields", "obstacle"),
    [
        ({}, ""),
        ({"use_rslora": True, "r": 512}, ""),
        ({"peft_type": "LOHA"}, "loads LoRA, and no other method"),
        ({"use_dora": True}, "does not load DoRA"),
        ({"modules_to_save": ["classifier"]}, "loads no trained head"),
        ({"bias": "all"}, "loads no biases"),
        ({"r": 513}, "rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 8}}, "one rank for all layers"),
    ],
)
def test_vllms_rule_admits_plain_lora_alone(fields: dict[str, Any], obstacle: str) -> None:
    found = vllm_obstacle({**LORA, **fields})
    assert (obstacle in found) if obstacle else not found


@pytest.mark.parametrize(
    "name", [n for n in catalogue.names() if export_forms(catalogue.get(n))["vllm"]["possible"]]
)
def test_exports_for_vllm_have_loras_tensors_alone(name: str, tmp_path: Path) -> None:
    save_peft(attach_lanes(CASES[0], catalogue.get(name), 1), "0", tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not vllm_obstacle(config)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    for key, shape in shapes.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert shape["lora_B" in key] == config["r"]
