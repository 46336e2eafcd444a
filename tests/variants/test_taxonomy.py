"""The taxonomy accounts for the survey's methods, for those of its code and of PEFT, and for every entry."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from peft import PeftType

from orchestrator.analyze.published import published_variants
from variants import catalogue
from variants.__main__ import Description, describe, read_methods
from variants.errors import UnsupportedError

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
