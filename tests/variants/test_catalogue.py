"""The catalogue: names, settings, `python -m variants`, forms of export, and the taxonomy of the survey.

The taxonomy accounts for the survey's methods, for those of its code and of PEFT, and for every entry.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType
from safetensors import safe_open

from orchestrator.analyze.published import published_variants
from variants import catalogue
from variants.__main__ import main
from variants.adapters import attach
from variants.api import (
    FrozenLayer,
    InitialTensors,
    LayerRandom,
    UnsupportedError,
    VariantSettings,
    VerifiedBy,
)
from variants.baseline.lora import LoRA
from variants.describe import (
    Description,
    count_parameters,
    describe,
    export_forms,
    read_methods,
    vllm_obstacle,
)
from variants.errors import suggest_nearest
from variants.storage import save_peft
from variants.testing.rig import CASES, Case, attach_lanes


def test_every_variant_that_was_verified_by_its_rule_has_a_test_of_it() -> None:
    verified = [
        name
        for name in catalogue.names()
        if catalogue.get(name).verified_by in (VerifiedBy.AUTHORS_CODE, VerifiedBy.PAPER)
    ]
    assert len(verified) > 30
    files = [*Path(__file__).parent.glob("rules/test_*.py"), *Path(__file__).parent.glob("test_*.py")]
    texts = [file.read_text() for file in files if file != Path(__file__)]
    assert [name for name in verified if not any(f'"{name}"' in text for text in texts)] == []


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"no variant 'rs-lora'. Did you mean 'rslora'\?"):
        catalogue.get("rs-lora")
    with pytest.raises(ValueError, match=f"Choose from: {', '.join(sorted(catalogue.names()))}"):
        catalogue.get("zzz")


def test_two_exchanged_letters_are_put_right() -> None:
    """The commonest mistake, of which `lroa` was answered with `road`."""
    names, wrong = catalogue.built_in_names(), []
    for name in names:
        for i in range(len(name) - 1):
            typed = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
            if typed not in names and suggest_nearest(typed, names) != f"Did you mean {name!r}?":
                wrong.append(typed)
    assert not wrong


def settings(rank: int = 4, alpha: float | None = 8.0, dropout: float = 0.0, **extra: Any) -> VariantSettings:
    return VariantSettings(rank, alpha, dropout, extra)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora", settings(0), "rank 0"),
        ("lora", settings(True), "rank True"),
        ("lora", settings(alpha=float("nan")), "alpha nan"),
        ("lora", settings(alpha=None), "alpha None"),
        ("lora", settings(alpha=-1.0), "alpha -1.0"),
        ("lora", settings(dropout=1.0), "dropout 1.0"),
        ("lora", settings(svd=4), "lora does not know 'svd'; its own settings: none"),
        ("pissa", settings(svd="fast"), "svd 'fast'"),
        ("pissa", settings(svd=0), "svd 0: must be 'exact' or a number of power iterations"),
        ("milora", settings(svd="16"), "svd"),
        ("relora", settings(merges=0), "merges 0: must be a whole number of at least 1"),
        ("relora", settings(pruned=1.0), "must be a number of at least 0 and below 1"),
        ("lora_ga", settings(gamma=0), "gamma 0: must be a finite number above 0"),
        ("delta_lora", settings(ratio=float("nan")), "ratio nan"),
        ("adalora", settings(warmup=0.6, final=0.5), "warmup and final"),
        ("incre_lora", settings(initial=5), "initial 5"),
        ("pro_lora", settings(unshared=4), "unshared 4: must be below the rank 4"),
        ("rasa", settings(shared=4), "shared 4: must be below the rank 4"),
        ("gralora", settings(3), "rank 3: must be a multiple of blocks 2"),
        ("lokr", settings(factor=0), "factor 0: must be at least 1, or -1 for no limit"),
        ("vb_lora", settings(vectors=2, top_k=3), "top_k 3: must be at most vectors 2"),
        ("boft", settings(block_size=3, factors=2), "block_size 3: must be even for more than one factor"),
        ("hra", settings(3), r"rank 3: .* it must be even"),
        ("road", settings(group_size=3), "group_size 3: must be even"),
        ("lora_moe", settings(1), "rank 1: no number of experts from 2 to 8 divides it"),
        ("lora_moe", settings(11), "rank 11: no number of experts from 2 to 8 divides it"),
        ("lora_moe", settings(top_k=5), "top_k 5: there are 4 experts"),
    ],
)
def test_invalid_settings_are_refused(name: str, given: VariantSettings, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        catalogue.get(name).validate_settings(given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gralora", settings(16, blocks=16), r"there\.0 has 24 inputs: blocks 16"),
        ("melora", settings(blocks=5), r"there\.0 has 24 inputs: blocks 5 does not divide them"),
        ("boft", settings(block_size=8, factors=2), r"there\.0 has 24 inputs: not a multiple of 16"),
        ("ether", settings(blocks=5), r"there\.0 has 24 inputs: blocks 5"),
        ("ether_plus", settings(blocks=5), r"there\.0 has 24 inputs: blocks 5"),
        ("ether_plus", settings(blocks=6), r"there\.0 has 40 outputs: blocks 6"),
        ("road", settings(group_size=64), r"there\.0 has 40 outputs: group_size 64 does not divide them"),
        ("vb_lora", settings(vector_length=16), "vector_length 16 does not divide 40 x 24"),
        ("mora", settings(12), r"there\.0 \(40 x 24\): rank 12 gives M the size 28; it must"),
        ("lora_ga", settings(13), "rank 13 is larger than layer there.0 allows: at most 12"),
        ("shira", settings(16), "rank 16 is larger than layer there.0 allows: at most 15"),
    ],
)
def test_settings_that_do_not_fit_a_layer_are_refused(
    name: str, given: VariantSettings, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        attach(Case("tall", out_features=40, in_features=24).build(), catalogue.get(name), given)


def test_defaults_are_filled_in() -> None:
    assert catalogue.get("pissa").validate_settings(VariantSettings()).extra == {"svd": "exact"}
    assert catalogue.get("hira").validate_settings(VariantSettings(alpha=16.0)).alpha is None
    assert catalogue.get("delta_lora").validate_settings(VariantSettings(dropout=0.5)).dropout == 0


# `python -m variants`.


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
    assert found == METHODS


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


# The taxonomy.


METHODS = read_methods()
CONTROLS = {"full", "head_only"}


def words(text: str) -> set[str]:
    return set(text.split())


SURVEY_CODE = words("""
    DoRA HiRA MoSLoRA MELoRA LoRA-GA LoRA-One rsLoRA PiSSA OLoRA VeRA ShareLoRA Tied-LoRA AdaLoRA
    Delta-LoRA LoRAMoE MiLoRA PeriodicLoRA MoRA GoRA IncreLoRA SaLoRA MoLA NLoRA NoRA RandLoRA DuDe
    LoRA-GA-Pro GOAT RaSA DenseLoRA EVA DeLoRA NZLoRA LoRA-SB LoRA-DA RaLoRA DRaLoRA PRoLoRA BSLoRA
    SineLoRA LoRAN LoDA AuroRA LoHa LoKr RidgeLoRA LoRA-Dash LoRA QLoRA LoRA-FA LoRA+ LoRA-Pro
    ReLoRA GaLore
""")
"""The 47 entries of `LORA_VARIANTS` in the survey's code, and the seven that it has outside that table."""
SECTION_II = words("""
    ReLoRA PeriodicLoRA COLA XGBLoRA MELoRA LoHa HiRA KronA LoKr MoRA ShareLoRA VeRA Tied-LoRA RaSA
    BSLoRA RandLoRA DenseLoRA PRoLoRA VB-LoRA E2LoRA AdaLoRA IncreLoRA SaLoRA ALoRA GoRA RaLoRA
    RaLoRA-Pro EVA SoRA AutoLoRA BiLoRA rsLoRA LoRA+ RPLoRA DoRA DeLoRA LoRA-Pro MoSLoRA LoDA AuroRA
    SineLoRA LoRAN DuDe NZLoRA PiSSA MiLoRA OLoRA SORSA NoRA NLoRA LaMDA LoRA-GA LoRA-One LoRA-SB
    LoRA-Dash CorDA MoELoRA LoRAMoE MoA AdaMoLE MoLA GOAT HydraLoRA MultiLoRA SiRA MTLoRA MLoRE
    LLaVA-MoLE
""")
"""The methods that section II of the survey places under one name."""
IMPLEMENTED = [each for each in METHODS if each["variant"]]


def titles(methods: list[Description]) -> list[str]:
    return sorted(each["title"] for each in methods)


def test_the_54_methods_of_the_surveys_code_are_accounted_for() -> None:
    assert len(SURVEY_CODE) == 54
    assert titles([each for each in METHODS if each["survey_code"]]) == sorted(SURVEY_CODE)


def test_the_methods_of_section_ii_are_accounted_for() -> None:
    assert SECTION_II - {each["title"] for each in METHODS} == set()


def test_the_twenty_that_the_survey_trained_are_marked_and_exist() -> None:
    twenty = {each["variant"] for each in METHODS if each["evaluated"]}
    assert twenty == set(published_variants())
    assert len(twenty) == 20
    assert twenty <= set(catalogue.names())


def test_every_method_of_peft_has_one_row() -> None:
    counts = Counter(each["peft"] for each in METHODS if each["peft"])
    assert counts == Counter(each.value for each in PeftType)


def test_each_row_has_an_entry_or_a_reason() -> None:
    assert [each["title"] for each in METHODS if bool(each["variant"]) == bool(each["reason"])] == []
    assert all(each["reason"].endswith(".") for each in METHODS if each["reason"])


def test_a_method_without_an_entry_names_the_tuner_of_peft_that_a_study_accepts() -> None:
    absent = {each["peft"]: each["reason"] for each in METHODS if each["peft"] and not each["variant"]}
    named = {peft for peft, reason in absent.items() if f"peft:{peft}" in reason}
    assert named == {peft for peft in absent if is_accepted(f"peft:{peft}")}


def is_accepted(name: str) -> bool:
    try:
        catalogue.get(name)
    except UnsupportedError:
        return False
    return True


def test_each_row_with_an_entry_names_one_of_its_own() -> None:
    counts = Counter(each["variant"] for each in IMPLEMENTED)
    assert counts <= Counter(set(catalogue.names()) - CONTROLS)
    assert counts.total() > 60


@pytest.mark.parametrize("method", IMPLEMENTED, ids=lambda each: each["variant"])
def test_a_row_agrees_with_the_entrys_folder_docstring_and_peft(method: Description) -> None:
    entry = describe(method["variant"])
    assert method["axis"] == entry["axis"]
    numbers = r"\d{4}\.\d{4,5}|(?<=openreview )\w+"
    paper = re.findall(numbers, method["paper"], re.IGNORECASE)
    assert paper == re.findall(numbers, entry["paper"], re.IGNORECASE)
    if method["peft"] and entry["peft"]:
        assert entry["peft"] in (method["peft"], "LORA"), (
            "a product of factors may be exported as a plain LoRA"
        )


def test_other_places_of_a_method_are_places_of_the_survey() -> None:
    places = {f"{each['axis']}.{each['leaf']}" for each in METHODS}
    assert {place for each in METHODS for place in each["also"]} <= places
