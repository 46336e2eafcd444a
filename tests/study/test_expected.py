"""The answer key in a file: its form, the tables that it names, and options that make it void."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from configurations import shipped
from orchestrator.experiments.lr_sensitivity import CurveOptions

from orchestrator.study.config import SHIPPED_FOLDER, make_options, shipped_studies, write_config
from orchestrator.study.option import help_texts
from orchestrator.util.errors import UsageError

ENTRY = "{quantity: score, variant: LoRA, rate: 2e-4, value: 0.66, tolerance: 0.01, source: a paper}"


TABLE = "{{quantity: table, file: {}, task: a, tolerance: 1, source: x, within: {}}}"
ROWS = {"short": "a,lora", "zero": "a,lora,0,50", "good": "a,lora,1e-3,50"}
"""Name of a CSV file -> its only row."""


def read(folder: Path, *entries: str, **typed: object) -> CurveOptions:
    """Return the options of a file with the entries, which has `task` and `rank`, and of typed options."""
    path = folder / "own.yaml"
    path.write_text("\n".join(["task: letters", "rank: 4", "expected:", *(f"- {each}" for each in entries)]))
    return make_options(CurveOptions, {"config": path, **typed}, "study")[0]


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("lora", "'lora': must be a mapping, such as {quantity: best_rate,"),
        ("{quantity: scor}", "quantity 'scor': must be one of score,"),
        (ENTRY.replace("rate", "rte"), "'rte' is no key of a score. Did you mean 'rate'?"),
        (ENTRY.replace("value: 0.66, ", ""), "a score needs value; add it to the entry."),
        (ENTRY.replace("0.66", "much"), "value 'much': must be a number."),
        (ENTRY.replace("2e-4", "-1"), "rate '-1': must be above 0."),
        (
            "{quantity: order, variant: lora, source: x}",
            "an order of 'lora': name two, as in `lora > pissa`.",
        ),
        (
            "{quantity: best_rate, variant: lora, value: 0, tolerance: 1, source: x}",
            "value 0 of a best_rate: must be above 0.",
        ),
        (
            "{quantity: table, file: no.csv, task: a, tolerance: 1, source: x}",
            "must be a CSV file with the columns task, variant, learning_rate (above 0), score",
        ),
        (TABLE.format("short.csv", 1), "file '"),
        (TABLE.format("zero.csv", 1), "(learning rate 0, score 50 of lora)"),
        (TABLE.format("good.csv", "abc"), "within 'abc': must be a number."),
        (TABLE.format("good.csv", -1), "within '-1': must be"),
    ],
)
def test_a_bad_entry_is_refused_in_one_line_with_its_line(tmp_path: Path, entry: str, error: str) -> None:
    for name, row in ROWS.items():
        (tmp_path / f"{name}.csv").write_text(f"task,variant,learning_rate,score\n{row}\n")
    with pytest.raises(UsageError) as refused:
        read(tmp_path, ENTRY, entry)
    assert str(refused.value).startswith(f"{tmp_path / 'own.yaml'}, line 5: expected: ")
    assert error in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_travels_with_study_yaml_and_can_be_given_in_python(tmp_path: Path) -> None:
    (entry,) = read(tmp_path, ENTRY).expected
    assert (entry.variant, entry.rate, entry.value, entry.untested) == ("lora", 2e-4, 0.66, "")
    (tmp_path / "study").mkdir()
    options = read(tmp_path, ENTRY, rank=8)
    write_config(tmp_path / "study", "study", options, "")
    again, _ = make_options(CurveOptions, {"config": tmp_path / "study" / "study.yaml"}, "study")
    assert again.expected == options.expected
    assert again.expected[0].untested == "--rank 8 in place of 4"
    given = {"task": "letters", "expected": [entry.to_entry()]}
    assert make_options(CurveOptions, given, "study")[0].expected == (entry,)


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ({"rank": 8, "batch_size": 2}, "--batch-size 2, --rank 8 in place of 4"),
        ({"weight_decay": 0.1}, "--set weight_decay=0.1"),
        ({"rank": 4, "variants": ["lora"], "seeds": 1, "learning_rates": ["1e-3"], "widen": 0}, ""),
        ({"device": "cpu", "study": "mine", "evaluations": None}, ""),
    ],
)
def test_an_option_that_changes_the_protocol_makes_the_key_void(
    tmp_path: Path, typed: dict[str, object], reason: str
) -> None:
    given = {name: value for name, value in typed.items() if value is not None}
    assert [each.untested for each in read(tmp_path, ENTRY, **given).expected] == [reason]


def test_a_table_gives_the_best_point_of_each_variant_and_its_cells() -> None:
    expected = shipped("published-glue").expected
    with (SHIPPED_FOLDER / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "glue_average"]
    assert sum(each.quantity == "score" for each in expected) == len(rows) == 140
    assert {each.variant for each in expected} == set(shipped("published-glue").variants or ())
    tied = next(
        each
        for each in shipped("lr-matters-qwen3-0.6b").expected
        if (each.quantity, each.variant) == ("best_rate", "pissa")
    )
    assert (tied.value, tied.tolerance) == (pytest.approx(6.31e-5, rel=1e-2), pytest.approx(0.5, abs=0.01))


def test_the_default_study_is_the_preset() -> None:
    default, _ = make_options(CurveOptions, {"rank": 8}, "study")
    assert default.preset == CurveOptions.default_config == "lr-matters-qwen3-0.6b"
    assert (default.rank, default.alpha, default.expected[0].untested) == (
        8,
        128.0,
        "--rank 8 in place of 128",
    )
    for name, value in {"task": "letters", "data": "a.csv", "model": "m", "dry_run": True}.items():
        assert make_options(CurveOptions, {name: value}, "study")[0].rank == 8


def test_the_help_names_every_preset() -> None:
    assert all(name in help_texts(CurveOptions)["config"] for name in shipped_studies())
