"""Studies with `peft:TYPE` and with a variant in a user's file, from the options to records and views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from configurations import read_configuration
from scripted import Script, configuration, crash_at, leases, numbers_of, solo, train

from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.finetune.resolve.templates import build_configuration_templates
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import get_value
from variants import catalogue
from variants.variant_settings import canonical_name

OWN = '''
"""A LoRA whose scaling is a hyperparameter."""

from variants.api import Number
from variants.baseline.lora import LoRA


class Scaled(LoRA):
    uses_alpha = False
    hyperparameters = {"factor": Number(2.0, above=0)}
    peft = None

    def scaling(self, settings):
        return settings["factor"]
'''
NAMES = ("peft:loha", "peft:SHIRA", "own-variant.v2.py")
HYPERPARAMETERS = {"peft:loha": "rank", "peft:SHIRA": "rank", "own-variant.v2.py": "factor"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a variant's file."""
    (tmp_path / "own-variant.v2.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def resolved(bases: Path, name: str, **more: object) -> list[Configuration]:
    typed = StudyOptions(task=("letters",), variants=("lora", name), steps=8, evaluations=4, **more)  # type: ignore[arg-type]
    chosen = resolve_options(typed, "letters", bases)
    return build_configuration_templates(typed, chosen, UNPREPARED, bases)


def small(name: str, bases: Path) -> Configuration:
    """Return a configuration that trains the tiny model, with the variant as a study resolves it."""
    _, template = resolved(bases, name, set=(f"{name}.{HYPERPARAMETERS[name]}=4",))
    return replace(configuration(steps=8, evaluations=4, variant="lora"), variant=template.variant)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_resolves_the_name_its_settings_and_the_version_of_the_code(
    name: str, tmp_path: Path
) -> None:
    own = HYPERPARAMETERS[name]
    lora, one = resolved(tmp_path, name, rank=2, set=(f"{name}.{own}=4",))
    assert one.variant.name == canonical_name(name)
    assert get_value(one, f"{one.variant.name}.{own}") == 4
    assert lora.variant.rank == 2
    assert one.variant.revision == catalogue.get(one.variant.name).revision != ""
    assert one.to_columns()["variant_revision"] == one.variant.revision
    changed = replace(one, variant=replace(one.variant, revision="other"))
    assert changed.fingerprint != one.fingerprint
    assert changed.group_key != one.group_key
    assert lora.variant.revision == ""
    assert read_configuration(one.to_json()) == one


@pytest.mark.parametrize("name", NAMES)
def test_a_space_varies_a_setting_of_the_variant(name: str, tmp_path: Path) -> None:
    key = f"{name}.{HYPERPARAMETERS[name]}"
    options = StudyOptions(
        task=("letters",), variants=("lora", name), search="qmc", points=3, space=(f"{key}=1,4",)
    )
    space = resolve_options(options, "letters", tmp_path).space
    assert space is not None
    assert [d.key for d in space["lora"]] == ["learning_rate"]
    found = [d.key for d in space[canonical_name(name)]]
    assert found == ["learning_rate", f"{canonical_name(name)}.{HYPERPARAMETERS[name]}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_lane_that_resumes_equals_one_that_was_not_interrupted(
    name: str, store: Store, tmp_path: Path
) -> None:
    one = small(name, tmp_path)
    crash_at(4, [one], store)
    train(Script(leases([one], attempt=2)), store)
    record = store.get(one.fingerprint)
    assert record is not None
    assert record.state == "finished", record.traceback
    assert record.provenance.resumed_from == (4,)
    assert record.curve[-1].loss < record.curve[0].loss
    assert numbers_of(record) == numbers_of(solo(one, tmp_path))


def test_a_worker_with_another_version_of_the_code_refuses_a_configuration(
    store: Store, tmp_path: Path
) -> None:
    one = small("own-variant.v2.py", tmp_path)
    one = replace(one, variant=replace(one.variant, revision="f" * 16))
    train(Script(leases([one])), store)
    record = store.get(one.fingerprint)
    assert record is not None
    assert "'own-variant.v2.py' with content ffffffffffffffff is not in" in record.reason
