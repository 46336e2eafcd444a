"""`--only`: single configurations of a study, looked up where the study requests or has recorded them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import ORCHESTRATOR, Run
from orchestrator.experiments.lr_sensitivity import EXPERIMENT, CurveOptions
from test_own_files import finished, requested

import orchestrator
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch.earlier_runs import keep_only
from orchestrator.launch.study import Study, resolve_study
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError

RATES = ("1e-3", "1e-2")


@pytest.fixture
def options(tmp_path: Path, base: Path) -> CurveOptions:
    """Return the options of a plan of 8 configurations."""
    return CurveOptions(
        task=("letters",), variants=("lora", "rslora"), model=str(base), learning_rates=RATES, seeds=2,
        output=tmp_path / "results", study="x", gpus_per_worker=0, plan=True,
    )  # fmt: skip


def chosen(options: CurveOptions, *digits: str, **more: Any) -> list[Configuration]:
    return resolve(replace(options, only=digits, **more)).requested


def resolve(options: CurveOptions) -> Study:
    """Return the study that --only leaves."""
    study = resolve_study(EXPERIMENT, options)
    study.look_up()
    keep_only(study)
    return study


def record(study: Study, configurations: Sequence[Configuration]) -> None:
    """Write the records of configurations into the store of a study, and list them in its `study.json`."""
    for configuration in configurations:
        study.store.put(finished(configuration))
    study.file.with_configurations([c.fingerprint for c in configurations], ()).write(study.folder)


def test_configurations_that_the_study_requests_are_found_and_planned_alone(options: CurveOptions) -> None:
    everything = requested(resolve_study(EXPERIMENT, options))
    first, last = everything[0], everything[-1]
    only = replace(options, only=(first.fingerprint[:10].upper(), last.fingerprint))
    study = resolve(only)
    assert study.pending == [first, last]
    assert (study.total, study.name_next_stage()) == (2, [])
    assert chosen(options, first.fingerprint, first.fingerprint[:9]) == [first]


def test_a_recorded_configuration_that_the_options_no_longer_request_is_found(options: CurveOptions) -> None:
    study = resolve_study(EXPERIMENT, options)
    point = requested(study)[0]
    record(study, [point])
    digits = point.fingerprint[:12]
    assert chosen(options, digits, learning_rates=("5e-3",)) == [point]
    with pytest.raises(UsageError, match=f"--only '{digits}': no configurations of study 'y' begin with it"):
        chosen(options, digits, learning_rates=("5e-3",), study="y")


def test_a_point_of_a_search_is_found_by_its_record(options: CurveOptions) -> None:
    study = resolve_study(EXPERIMENT, options)
    template = study.templates[0]
    point = replace(template, optimizer=replace(template.optimizer, learning_rate=4.56e-3))
    record(study, [point])
    search: dict[str, Any] = {"search": "optuna", "learning_rates": None, "seeds": None}
    found = resolve(replace(options, only=(point.fingerprint[:12],), **search))
    assert found.requested == [point]
    assert found.search is None
    assert not (found.folder / "optuna.journal").exists()


@pytest.mark.parametrize("store", ["", "elsewhere"])
def test_the_study_of_the_config_is_looked_up_from_another_output(
    options: CurveOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Its store is beside its folder, unless study.yaml names another one."""
    root = tmp_path / store if store else None
    study = resolve_study(EXPERIMENT, replace(options, store=root))
    point = requested(study)[0]
    record(study, [point])
    (study.folder / "study.yaml").write_text(f"store: {root}\n" if root else "seeds: 2\n")
    monkeypatch.chdir(study.folder)
    again = replace(options, output=tmp_path / "again", learning_rates=("5e-3",))
    assert chosen(again, point.fingerprint[:12], config=Path("study.yaml")) == [point]
    with pytest.raises(UsageError, match="no configurations of study 'x'"):
        chosen(again, point.fingerprint[:12])


def test_a_study_that_goes_on_from_its_file_asks_for_the_password_that_the_file_lacks(
    options: CurveOptions,
) -> None:
    study = resolve_study(EXPERIMENT, options)
    replace(study.file, tracking_uri="http://me:***@none.invalid").write(study.folder)
    (study.folder / "study.yaml").write_text("seeds: 2\n")
    resolve_study(EXPERIMENT, options)  # a command that is typed again says where its runs go
    with pytest.raises(UsageError, match="passwords are not stored; give the option with the password"):
        resolve_study(EXPERIMENT, replace(options, config=study.folder / "study.yaml"))


def test_unknown_and_ambiguous_digits_are_one_line(options: CurveOptions) -> None:
    study = resolve_study(EXPERIMENT, options)
    fingerprints = [c.fingerprint for c in requested(study)]
    with pytest.raises(
        UsageError, match=r"--only '0000000': no configurations .*; take one of these: "
    ) as refused:
        chosen(options, "0000000")
    assert fingerprints[0][:12] in str(refused.value)
    every = [replace(study.templates[0], seed=seed) for seed in range(17)]  # two share their first digit
    firsts = [c.fingerprint[0] for c in every]
    digit = next(digit for digit in firsts if firsts.count(digit) > 1)
    with pytest.raises(
        UsageError,
        match=f"--only '{digit}': . configurations .* begin with it; give more digits: {digit}",
    ):
        keep_only(replace(study, options=replace(options, only=(digit,)), requested=every))
    with pytest.raises(UsageError, match="--only is empty"):
        replace(options, only=())


def test_what_this_command_cannot_train_is_refused(options: CurveOptions) -> None:
    study = resolve_study(EXPERIMENT, options)
    template = study.templates[0]
    other_base = replace(template, model=replace(template.model, content="other"))
    other_numerics = replace(template, loop_numerics=template.loop_numerics + 1)
    for point in (other_base, other_numerics):
        study.store.put(finished(point))
    file = StudyFile("x", "", "", (other_base.fingerprint, other_numerics.fingerprint, "f" * 64))
    for digits, message in (
        (other_base.fingerprint[:20], "lora on letters was trained with other data, another base model or"),
        (other_numerics.fingerprint[:20], "another version of the program; repeat the options"),
        ("f" * 64, "has no record of it, and the options do not request it"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            keep_only(replace(study, options=replace(options, only=(digits,)), file=file))
        assert str(refused.value).startswith("--only ")
        assert "\n" not in str(refused.value)


def test_a_plan_names_a_recorded_configuration_before_its_base_model_is_prepared(
    options: CurveOptions,
) -> None:
    study = resolve_study(EXPERIMENT, options)
    point = requested(study)[0]
    record(study, [point])
    file = StudyFile("x", "", "", (point.fingerprint,))
    unprepared = replace(point.model, content=UNPREPARED)
    templates = tuple(replace(each, model=unprepared) for each in study.templates)
    only = replace(options, only=(point.fingerprint,))
    planned = replace(study, options=only, file=file, templates=templates, requested=[])
    keep_only(planned)
    assert planned.requested == [point]


def test_a_printed_command_trains_a_recorded_configuration_in_another_output(
    options: CurveOptions, run: Run, tmp_path: Path
) -> None:
    """The options of study.yaml need not request it any more."""
    study = resolve_study(EXPERIMENT, options)
    point = requested(study)[0]
    record(study, [point])
    (study.folder / "study.yaml").write_text(
        f"task: letters\nvariants: [lora, rslora]\nmodel: {options.model}\nlearning_rates: 5e-3\n"
    )
    command = shlex.split(study.file.train_again([point.fingerprint], store=study.store.root))
    planned = run(ORCHESTRATOR, *command[1:], "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "Learning rates  0.001\n" in planned.stdout
    assert "Configurations  1, of them 0 known" in planned.stdout


@pytest.mark.slow
def test_the_study_keeps_its_kind_its_options_and_its_other_configurations(
    base: Path, run: Run, tmp_path: Path
) -> None:
    """Also those without a record, which a comparison drops when a whole command does not request them."""
    output = tmp_path / "results"
    words = ["tuned", "--task", "letters", "--variants", "rslora", "--model", str(base), "--replicates", "2"]
    words += ["--learning-rates", *RATES, "--output", str(output), "--study", "x"]

    study = orchestrator.Study(
        "tuned", task=["letters"], variants=["rslora"], model=str(base), replicates=2,
        learning_rates=list(RATES), output=output, study="x",
    )  # fmt: skip
    (plan,) = orchestrator.plan(study)
    store = Store(output / "store")
    for configuration in plan.requested:
        store.put(finished(configuration))
    folder = output / "x"
    listed = (*(c.fingerprint for c in plan.requested), "f" * 64)
    settings = AnalysisSettings(kind="replicates")
    before = StudyFile("x", "?", "the whole command", listed, settings=settings, experiment="tuned")
    before.write(folder)
    (folder / "study.yaml").write_text("seeds: 2\n")
    digits = plan.requested[0].fingerprint[:12]
    one = run(ORCHESTRATOR, *words, "--only", digits, "--save-adapters", "none")
    assert one.returncode == 0, one.stderr
    assert "x: 1 of 1 known, nothing to train" in one.stdout
    after = StudyFile.read(folder)
    assert after is not None
    assert after == replace(before, sources=after.sources)
    assert (folder / "study.yaml").read_text() == "seeds: 2\n"
    shown = run(ORCHESTRATOR, *words, "--only", digits, "--plan")
    assert "Configurations  1, of them 1 known" in shown.stdout
    run(ORCHESTRATOR, *words, "--only", "zz").assert_refused("--only 'zz': no configurations", "take one")
