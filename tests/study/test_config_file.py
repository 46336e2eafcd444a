"""`--config`: wrong files are refused in one line with file and line; a study's file repeats the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import SWEEP, Run

from orchestrator.cli.arguments import parse_options
from orchestrator.launch.script_options import ComparisonOptions, CurveOptions
from orchestrator.study.config_file import given_values, read_config, write_config
from variants import catalogue


def test_a_typed_value_replaces_that_of_the_file_and_is_not_blamed_on_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("dry_run: true\ngrid:\n  rank: 4\n  variants: LoRA+,PiSSA\n  seeds: 1\n")
    words = ["--config", "s.yaml"]
    assert parse_options("", CurveOptions, words).rank == 4
    typed = parse_options("", CurveOptions, [*words, "--rank", "16", "--no-dry-run"])
    assert (typed.rank, typed.dry_run, typed.variants) == (16, False, ("LoRA+", "PiSSA"))
    done = run(SWEEP, *words, "--plan", "--learning-rates", "1e-3,1e-2")
    assert "Variants        lora_plus pissa\nLearning rates  0.001 0.01\n" in done.stdout
    run(SWEEP, *words, "--rank", "0").assert_refused("error: --rank 0: must be 1 or more")


@pytest.mark.parametrize(
    ("options_class", "words"),
    [
        (CurveOptions, "--dry-run --variants lora,PiSSA --learning-rates 1e-3 0.02 --seeds 2 --widen 0.5"),
        (CurveOptions, "--search optuna --space rank=4,8 warmup=0:0.1 --points 40 --max-hours 1e-05"),
        (CurveOptions, "--base-dropout off --targets re:q_.* --set weight_decay=0.01 lora_plus.ratio=4"),
        (CurveOptions, "--preset published-gsm8k-r128 --set warmup=0.1 --steps 7 --variants lora"),
        (CurveOptions, ""),
        (ComparisonOptions, "--replicates 3 --max-replicates 6 --task letters digits --margin 0.02"),
    ],
)
def test_the_file_of_a_study_repeats_its_options(
    options_class: type[CurveOptions | ComparisonOptions], words: str, tmp_path: Path
) -> None:
    options = parse_options("", options_class, words.split())
    write_config(tmp_path, "", given_values(options, catalogue.names()))
    file = tmp_path / "study.yaml"
    again = parse_options("", options_class, ["--config", str(file)])
    assert given_values(again, catalogue.names()) | {"config": None} == (
        given_values(options, catalogue.names()) | {"config": None}
    )


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ("--data a.csv org/name --model base --variants lora ours.py", ("a.csv", "base", "ours.py")),
        ("--data a.csv --test-data t.csv --model letters-base", ("a.csv", "t.csv")),
        ("--task ours.py letters --output out --store kept", ("ours.py", "out", "kept")),
        ("--tracking-uri sqlite:///runs/m.db?timeout=9", ()),
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
    options = parse_options("", CurveOptions, words.split())
    folder = options.study_folder("x")
    write_config(folder, "", given_values(options, catalogue.names()), ["letters-base"])
    (folder / "study.json").touch()
    monkeypatch.chdir(tmp_path / "lora")
    again = parse_options("", CurveOptions, ["--config", str(tmp_path / folder / "study.yaml")])
    full = parse_options("", CurveOptions, [str(tmp_path / w) if w in paths else w for w in words.split()])
    uri = (options.tracking_uri or "").replace("runs/", f"{tmp_path}/runs/") or None
    assert replace(again, config=None) == replace(
        full, study="x", output=tmp_path / options.output, tracking_uri=uri
    )


def test_the_file_of_a_study_holds_no_secret(tmp_path: Path) -> None:
    words = ["--tracking-uri", "http://user:pl4nted@host:1", "--rank", "4"]
    options = parse_options("", CurveOptions, words)
    write_config(tmp_path, "", given_values(options, catalogue.names()))
    text = (tmp_path / "study.yaml").read_text()
    assert "pl4nted" not in text
    assert "# tracking_uri is left out" in text
    assert read_config(tmp_path / "study.yaml", CurveOptions).values == {"rank": 4}
