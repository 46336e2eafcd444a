"""What the script of a tuned comparison chooses, keeps, refuses and asks of its second stage, without Ray."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import record, study

from orchestrator.analyze import selection
from orchestrator.analyze.comparison import ChosenPoint, TunedChoice
from orchestrator.analyze.tuning import summarize_tuning
from orchestrator.finetune import resolve
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import StudyError, UsageError

SCRIPT = Path(__file__).parents[2] / "experiments" / "tuned_comparison.py"
NAME = "c-tune"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("tuned_comparison", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def options(script: Any, output: Path, *variants: str, **more: Any) -> Any:
    return script.ComparisonOptions(output=output, study=NAME, variants=variants, **more)


def begun(output: Path, records: list[Record]) -> list[str]:
    """A study of these records, all of them in the store."""
    store = Store(output / "store")
    for each in records:
        store.put(each)
    names = [each.fingerprint for each in records]
    StudyFile(NAME, "", "", tuple(names)).write(output / NAME)
    return names


def of(*variants: str) -> list[Record]:
    return [each for each in study() if each.configuration.variant.name in variants]


@pytest.mark.parametrize(
    "more",
    [
        {"search": "qmc", "set": ("learning_rate=1e-2", "weight_decay=0.01"), "space": ("rank=4,8",)},
        {"search": "optuna", "set": ("lora.learning_rate=1e-2",), "sampler": "tpe", "points": 4},
        {"search": "random", "space": ("learning_rate=log:1e-3:1e-2", "pissa.rank=4,8")},
        {"learning_rates": ("1e-2",), "scheduler": "asha", "set": ("weight_decay=0.01",)},
    ],
    ids=["a fixed rate", "one variant's", "a space", "a grid"],
)
def test_what_tunes_can_be_confirmed_too(script: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    tune = options(script, tmp_path, "lora", "pissa", confirm_seeds=7, **more)
    resolve.resolve_options(tune, "letters", ("lora",), tmp_path)
    confirm = script._confirm_options(tune, "c-confirm")
    chosen = resolve.resolve_options(confirm, "letters", ("lora",), tmp_path)
    assert chosen.space is None
    assert (confirm.study, confirm.seed_count, confirm.scheduler) == ("c-confirm", 7, "none")
    assert [word for word in tune.set if "weight_decay" in word] == list(confirm.set), "fixed for both stages"


def test_a_variant_after_the_choice_is_refused_before_it_is_trained(script: Any, tmp_path: Path) -> None:
    names, tune = begun(tmp_path, of("lora", "pissa")), options(script, tmp_path, "lora", "pissa")
    wanted = [each.configuration for each in of("lora", "pissa")]
    script._check_tuning(tune, wanted)
    kept = selection.load_or_make_choice(tmp_path / NAME, TunedChoice, lambda: script._current_choice(tune))
    assert set(kept.configurations) == set(names)
    script._check_tuning(tune, wanted)
    script._check_tuning(options(script, tmp_path, "lora", "pissa"), wanted[:3])  # a part changes nothing
    # A learning sampler has asked nothing for the new one yet: the configurations are those of the choice.
    for some in (wanted, [each.configuration for each in of("lora", "pissa", "hira")]):
        with pytest.raises(UsageError, match=r"--variants hira: .* has chosen for lora pissa alone"):
            script._check_tuning(options(script, tmp_path, "lora", "pissa", "hira"), some)
    with pytest.raises(KeyError):
        script._chosen_configurations(kept, ("lora", "hira"))


def test_a_choice_is_made_among_what_one_command_asks_for(script: Any, tmp_path: Path) -> None:
    """A study that was begun with 30 steps is no study of 60."""
    begun(tmp_path, [record("lora", 1e-2, 0, 0.99, steps=30), record("lora", 3e-3, 0, 0.2, steps=30)])
    tune = options(script, tmp_path, "lora", "pissa")
    with pytest.raises(UsageError, match="has begun with 2 configurations that this command does not"):
        script._check_tuning(tune, [each.configuration for each in of("lora", "pissa")])
    script._check_tuning(tune, [record("lora", rate, 0, 0.0, steps=30).configuration for rate in (3e-3, 1e-2, 3e-2)])


def test_one_without_a_score_is_kept_as_such_and_said(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [record("hira", rate, 0, None, state="failed") for rate in (1e-3, 1e-2)]
    begun(tmp_path, [*of("lora"), *failed])
    tune = options(script, tmp_path, "lora", "hira", "dora")
    kept = selection.load_or_make_choice(tmp_path / NAME, TunedChoice, lambda: script._current_choice(tune))
    assert kept.variants["lora"] is not None
    assert (kept.variants["hira"], kept.variants["dora"]) == (None, None)
    (lora,) = script._chosen_configurations(kept, tune.variants)
    (found,) = summarize_tuning(of("lora"))
    expected = ChosenPoint.from_tuning(found)
    assert expected is not None
    assert lora == expected.configuration
    said = capsys.readouterr().out
    for variant in ("hira", "dora"):
        assert f"{variant} has no score at any point: it is not compared, and counts as unknown" in said
    begun(tmp_path, failed)
    with pytest.raises(StudyError, match="lora has no score at any point"):
        script._current_choice(tune)


def test_the_budget_of_a_search_is_fixed_with_its_choice(script: Any, tmp_path: Path) -> None:
    begun(tmp_path, of("lora"))
    wanted = [each.configuration for each in of("lora")]
    tune = options(script, tmp_path, "lora", search="qmc", points=4)
    kept = selection.load_or_make_choice(tmp_path / NAME, TunedChoice, lambda: script._current_choice(tune))
    assert kept.points == 4
    script._check_tuning(tune, wanted)
    for other in (replace(tune, points=5), replace(tune, points=None, search="grid")):
        with pytest.raises(UsageError, match="chosen among 4 points a variant"):
            script._check_tuning(other, wanted)


def test_looks_are_written_down_and_survive_more_configurations(script: Any, tmp_path: Path) -> None:
    begun(tmp_path, of("lora"))
    for seeds in (10, 10, 5, 20):
        script._record_look(options(script, tmp_path, "lora", confirm_seeds=seeds))
    found = StudyFile.read(tmp_path / NAME)
    assert found is not None
    assert found.looks == found.with_configurations(["f" * 64], ()).looks == (10, 20)
