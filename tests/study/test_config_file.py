"""`--config`: typed options go before those of a file; a study's file repeats the study, wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import SWEEP, Run
from orchestrator.experiments.hyperparameter_sensitivity import SensitivityOptions
from orchestrator.experiments.lr_sensitivity import CurveOptions
from orchestrator.experiments.tuned_comparison import ComparisonOptions

from orchestrator.cli.parsing import parse
from orchestrator.experiments import options_of
from orchestrator.study.config import make_options, read_config, write_config
from orchestrator.util.errors import UsageError


def parsed(options_class: type[Any], *words: str) -> Any:
    return make_options(options_class, parse(options_class, words, "x", ""), "study")[0]


def test_a_typed_value_replaces_that_of_the_file_and_is_not_blamed_on_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("dry_run: true\ngrid:\n  rank: 4\n  variants: LoRA+,PiSSA\n  seeds: 1\n")
    words = ["--config", "s.yaml"]
    assert parsed(CurveOptions, *words).rank == 4
    typed = parsed(CurveOptions, *words, "--rank", "16", "--no-dry-run")
    assert (typed.rank, typed.dry_run, typed.variants) == (16, False, ("LoRA+", "PiSSA"))
    done = run(SWEEP, *words, "--plan", "--learning-rates", "1e-3,1e-2")
    assert "Variants        lora_plus pissa\nLearning rates  0.001 0.01\n" in done.stdout
    run(SWEEP, *words, "--rank", "0").assert_refused("error: --rank 0: must be 1 or more")


def test_a_file_of_another_experiment_gives_what_both_have(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("experiment: study\nstudy: mine\nseeds: 3\nwiden: 0\nrank: 4\n")
    options, _ = make_options(ComparisonOptions, {"config": tmp_path / "s.yaml"}, "tuned", options_of)
    assert (options.study, options.seeds, options.rank) == (None, None, 4)
    for wrong, named in (
        ("rank: big\nexperiment: study", "line 1: rank 'big'"),
        ("experiment: studdy", "'study'"),
    ):
        (tmp_path / "s.yaml").write_text(wrong)
        with pytest.raises(UsageError, match=named):
            make_options(ComparisonOptions, {"config": tmp_path / "s.yaml"}, "tuned", options_of)


def test_the_file_of_a_study_names_it_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / "mine"
    folder.mkdir(parents=True)
    (folder / "study.json").touch()
    (folder / "study.yaml").write_text("experiment: study\n")
    monkeypatch.chdir(folder)
    options = parsed(CurveOptions, "--config", "study.yaml")
    assert (options.study, options.output) == ("mine", tmp_path / "results")
    other, _ = make_options(ComparisonOptions, {"config": "study.yaml"}, "tuned", options_of)
    assert (other.study, other.output) == (None, tmp_path / "results")
    Path("copy.yaml").write_text("experiment: study\n")
    assert parsed(CurveOptions, "--config", "copy.yaml").study is None, "a copy begins a study of its own"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rank: 4\nweight_decay: abc", "line 2: weight_decay: 'abc'"),
        ("rank: 4\nset: {warmup: 0, warmup: 1}", "line 2: .*twice"),
        ("rank: 4\nexperiment: study\nexperiment: tuned", "line 3: .*line 2"),
        ("experiment:", "'None'"),
        ("experiment: [study]", r"\['study'\]"),
        ("experiment: published\nweight_decay: 0.1", "'published'"),
    ],
)
def test_a_fault_in_a_file_names_its_line(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=named):
        make_options(CurveOptions, {"config": tmp_path / "s.yaml"}, "study", options_of)


def test_the_settings_of_the_baseline_stay_beside_typed_variants(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("set: [lora.alpha=32, pissa.alpha=8, dora.alpha=4]\n")
    typed = {"config": file, "variants": "pissa"}
    assert make_options(CurveOptions, typed, "study")[0].set == ("pissa.alpha=8",)
    assert make_options(ComparisonOptions, typed, "tuned")[0].set == ("lora.alpha=32", "pissa.alpha=8")


def test_python_gives_pairs_as_values(tmp_path: Path) -> None:
    pairs = {"set": {"eva.whiten": True}, "space": {"rank": [4, 8]}}
    given = {**pairs, "search": "qmc", "task": "letters"}
    options = make_options(CurveOptions, given, "study")[0]
    assert (options.set, options.space) == (("eva.whiten=true",), ("rank=4,8",))


def test_what_has_no_meaning_beside_a_typed_option_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("data: a.csv\ncolumns: [text=body]\nsearch: optuna\nsampler: tpe\nspace: [rank=2:4]\n")
    found = parsed(CurveOptions, "--config", str(file), "--task", "letters", "--search", "grid")
    assert found.given().keys() == {"config", "task"}
    file.write_text("search: qmc\nspace: ['pissa.svd=2,4']\n")
    assert parsed(CurveOptions, "--config", str(file), "--variants", "lora").space is None


@pytest.mark.parametrize(
    ("options_class", "words"),
    [
        (CurveOptions, "--dry-run --variants lora,PiSSA --learning-rates 1e-3 0.02 --seeds 2 --widen 0.5"),
        (CurveOptions, "--search optuna --space rank=4,8 warmup=0:0.1 --points 40 --max-hours 1e-05"),
        (CurveOptions, "--base-dropout off --targets re:q_.* --set lora_plus.ratio=4 --weight-decay 0.01"),
        (CurveOptions, "--config published-gsm8k-r128 --set warmup=0.1 --steps 7 --variants lora"),
        (CurveOptions, ""),
        (SensitivityOptions, "--factors rank,alpha --levels 1 --margin 0.02"),
        (ComparisonOptions, "--replicates 3 --task letters digits --margin 0.02"),
    ],
)
def test_the_file_of_a_study_repeats_its_options(
    options_class: type[Any], words: str, tmp_path: Path
) -> None:
    options = parsed(options_class, *words.split())
    write_config(tmp_path, "study", options, "")
    again = parsed(options_class, "--config", str(tmp_path / "study.yaml"))
    assert replace(again, config=None) == replace(options, config=None)


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ("--data a.csv org/name --model base --variants lora ours.py", ("a.csv", "base", "ours.py")),
        ("--data a.csv --test-data t.csv --model letters-base", ("a.csv", "t.csv")),
        ("--task ours.py letters --output out --store kept", ("ours.py", "out", "kept")),
        ("--task letters --tracking-uri sqlite:///runs/m.db?timeout=9", ()),
        ("--tracking-uri http://127.0.0.1:5000", ()),
    ],
)
def test_the_file_of_a_study_repeats_it_in_another_folder(
    words: str, paths: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.csv", "t.csv", "ours.py"):
        (tmp_path / name).touch()
    for name in ("base", "out/x", "kept", "results/x", "lora", "letters", "letters-base"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = parsed(CurveOptions, *words.split())
    folder = options.study_folder("x")
    write_config(folder, "study", options, "", ["letters-base"])
    (folder / "study.json").touch()
    monkeypatch.chdir(tmp_path / "lora")
    again = parsed(CurveOptions, "--config", str(tmp_path / folder / "study.yaml"))
    full = parsed(CurveOptions, *(str(tmp_path / w) if w in paths else w for w in words.split()))
    uri = (options.tracking_uri or "").replace("runs/", f"{tmp_path}/runs/") or None
    where = tmp_path / options.output
    assert replace(again, config=None) == replace(
        full, study="x", output=where, tracking_uri=uri, config=None
    )


def test_the_file_of_a_study_holds_no_secret(tmp_path: Path) -> None:
    options = parsed(CurveOptions, "--tracking-uri", "http://user:pl4nted@host:1", "--task", "letters")
    write_config(tmp_path, "study", options, "")
    text = (tmp_path / "study.yaml").read_text()
    assert "pl4nted" not in text
    assert "# tracking_uri is left out" in text
    assert read_config(str(tmp_path / "study.yaml"), CurveOptions).values == {"task": ("letters",)}
