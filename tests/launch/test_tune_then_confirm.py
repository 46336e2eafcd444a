"""The choice that a tuned comparison makes and passes to its second stage, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import record, study

from orchestrator.analyze import selection
from orchestrator.analyze.comparison import ChosenPoint, TunedChoice
from orchestrator.analyze.tuning import summarize_tuning
from orchestrator.finetune.resolve.option_names import resolve_options
from orchestrator.launch.tune_then_confirm import (
    TuningStage,
    chosen_configurations,
    confirm_options,
    record_look,
)
from orchestrator.launch.two_stage_options import ComparisonOptions
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import StudyError, UsageError

NAME = "c-tune"


def stage(output: Path, *variants: str, **more: Any) -> TuningStage:
    return TuningStage(ComparisonOptions(output=output, variants=variants, **more), NAME, "lora")


def begin_study(output: Path, records: list[Record]) -> list[str]:
    """Store these records and write a study of them. Return their fingerprints."""
    store = Store(output / "store")
    for each in records:
        store.put(each)
    fingerprints = [each.fingerprint for each in records]
    StudyFile(NAME, "", "", tuple(fingerprints)).write(output / NAME)
    return fingerprints


def records_of(*variants: str) -> list[Record]:
    return [each for each in study() if each.configuration.variant.name in variants]


def choose(tuning: TuningStage) -> TunedChoice:
    return selection.load_or_make_choice(tuning.folder, TunedChoice, tuning.current_choice)


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
def test_whatever_can_be_tuned_can_be_confirmed(tmp_path: Path, more: dict[str, Any]) -> None:
    tune = stage(tmp_path, "lora", "pissa", confirm_seeds=7, **more).options
    resolve_options(tune, "letters", ("lora",), tmp_path)
    confirm = confirm_options(tune, "c-confirm")
    resolved = resolve_options(confirm, "letters", ("lora",), tmp_path)
    assert resolved.space is None
    assert (confirm.study, confirm.seed_count, confirm.scheduler) == ("c-confirm", 7, "none")
    assert [word for word in tune.set if "weight_decay" in word] == list(confirm.set), "fixed for both stages"


def test_a_variant_after_the_choice_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    fingerprints, tuning = (
        begin_study(tmp_path, records_of("lora", "pissa")),
        stage(tmp_path, "lora", "pissa"),
    )
    requested = [each.configuration for each in records_of("lora", "pissa")]
    tuning.check(requested)
    choice = choose(tuning)
    assert set(choice.configurations) == set(fingerprints)
    tuning.check(requested)
    # A subset of the configurations is accepted.
    tuning.check(requested[:3])
    # A sampler that learns may not have asked for a point of the new variant yet. The configurations are then
    # the same as before.
    for some in (requested, [each.configuration for each in records_of("lora", "pissa", "hira")]):
        with pytest.raises(UsageError, match=r"--variants hira: .* has chosen for lora pissa alone"):
            stage(tmp_path, "lora", "pissa", "hira").check(some)
    with pytest.raises(KeyError):
        chosen_configurations(choice, ("lora", "hira"))


def test_a_choice_is_made_among_the_configurations_of_one_command(tmp_path: Path) -> None:
    """A study that began with 30 steps cannot go on with 60."""
    begin_study(tmp_path, [record("lora", 1e-2, 0, 0.99, steps=30), record("lora", 3e-3, 0, 0.2, steps=30)])
    tuning = stage(tmp_path, "lora", "pissa")
    with pytest.raises(UsageError, match="has begun with 2 configurations that this command does not"):
        tuning.check([each.configuration for each in records_of("lora", "pissa")])
    rates = (3e-3, 1e-2, 3e-2)
    tuning.check([record("lora", rate, 0, 0.0, steps=30).configuration for rate in rates])


def test_a_variant_without_a_score_is_kept_as_such_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [record("hira", rate, 0, None, state="failed") for rate in (1e-3, 1e-2)]
    begin_study(tmp_path, [*records_of("lora"), *failed])
    tuning = stage(tmp_path, "lora", "hira", "dora")
    choice = choose(tuning)
    assert choice.variants["lora"] is not None
    assert (choice.variants["hira"], choice.variants["dora"]) == (None, None)
    (lora,) = chosen_configurations(choice, ("lora", "hira", "dora"))
    (result,) = summarize_tuning(records_of("lora"))
    expected = ChosenPoint.from_tuning(result)
    assert expected is not None
    assert lora == expected.configuration
    printed = capsys.readouterr().out
    for variant in ("hira", "dora"):
        assert f"{variant} has no score at any point: it is not compared, and counts as unknown" in printed
    begin_study(tmp_path, failed)
    with pytest.raises(StudyError, match="lora has no score at any point"):
        tuning.current_choice()


def test_the_budget_of_a_search_is_fixed_with_its_choice(tmp_path: Path) -> None:
    begin_study(tmp_path, records_of("lora"))
    requested = [each.configuration for each in records_of("lora")]
    tuning = stage(tmp_path, "lora", search="qmc", points=4)
    assert choose(tuning).points == 4
    tuning.check(requested)
    for more in ({"points": 5}, {"points": None, "search": "grid"}):
        other = replace(tuning, options=replace(tuning.options, **more))
        with pytest.raises(UsageError, match="chosen among 4 points a variant"):
            other.check(requested)


def test_looks_are_written_down_and_survive_more_configurations(tmp_path: Path) -> None:
    begin_study(tmp_path, records_of("lora"))
    for seeds in (10, 10, 5, 20):
        record_look(stage(tmp_path, "lora", confirm_seeds=seeds).options, NAME)
    found = StudyFile.read(tmp_path / NAME)
    assert found is not None
    assert found.looks == found.with_configurations(["f" * 64], ()).looks == (10, 20)
