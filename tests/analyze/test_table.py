"""The terminal: verdicts first, then tables of at most 80 columns."""

from __future__ import annotations

import io
import shlex

from rich.console import Console
from synthetic import record, study, summarize_curves

from orchestrator.analyze.results import Summary
from orchestrator.analyze.study_description import describe_summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.table import render_summary
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile


def printed(records: list[Record]) -> str:
    return show(summarize_curves(records))


def show(summary: Summary) -> str:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(render_summary(summary))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_verdicts_come_first_with_outcome_answer_design_and_what_would_narrow_it() -> None:
    command = "python experiments/tuned_comparison.py " + " ".join(f"--option-{i} {i}" for i in range(20))
    verdict = Verdict("Claim.", "undecided", "The answer.", "The design.", "Train more:", command)
    text = show(Summary((verdict,), (), {}, {}, ("a warning",)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[:4] == ["UNDECIDED  Claim.", "The answer.", "The design.", "Train more:"]
    assert max(len(line) for line in text.splitlines()) <= 80
    copied = text[text.index("python") : text.index("!")].replace("\\\n", " ")
    assert shlex.split(copied) == shlex.split(command)  # a shell reads the lines as one
    assert lines[-1] == "! a warning"
    of_study = printed(study())
    assert of_study.index("DESCRIPTIVE") < of_study.index("validation")


def test_the_table_fits_80_columns_with_every_number_whole() -> None:
    text = printed(study())
    assert max(len(line) for line in text.splitlines()) <= 80
    row = next(line for line in text.splitlines() if line.startswith(" lora "))
    assert row.split() == ["lora", "1e-2", "inside", "0.967", "[0.91,", "1.00]", "0.957", "12/21", "0.00"]


def test_rates_of_three_digits_leave_room_for_the_last_column() -> None:
    rates = ((5.48e-3, 0.9), (1.73e-2, 0.96), (5.48e-2, 0.2))
    records = [
        record(v, r, s, x + s / 100) for v in ("lora", "lora-plus") for r, x in rates for s in range(3)
    ]
    text = printed(records)
    row = next(line for line in text.splitlines() if line.startswith(" lora-plus "))
    assert row.split()[1] == "1.73e-2"
    assert row.split()[-1] == "0.00"
    assert {"lost", "at", "LoRA's", "rate"} <= set(text.split())


def test_a_variant_that_was_not_trained_at_loras_best_rate_has_no_loss_there() -> None:
    lora, pissa = ((1e-3, 0.5), (1e-2, 0.6), (1e-1, 0.9)), ((1e-4, 0.2), (1e-3, 0.8), (1e-2, 0.5))
    records = [record(v, r, 0, x) for v, own in (("lora", lora), ("pissa", pissa)) for r, x in own]
    (panel,) = summarize_curves(records).panels
    curve = next(c for c in panel.curves if c.label == "pissa")
    assert panel.reference_best_rate == 1e-1
    assert curve.regret_at_average_best is not None
    row = next(line for line in printed(records).splitlines() if line.startswith(" pissa "))
    assert row.split()[-1] == "-"


def test_long_names_and_edges_still_fit() -> None:
    records = [
        record("a-variant-with-a-very-long-name", r, s, v)
        for r, v in ((1e-3, 0.9), (1e-2, 0.2))
        for s in (0, 1)
    ]
    text = printed(records)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "low edge" in text


def test_one_seed_shows_no_plus_minus_and_an_empty_study_prints() -> None:
    row = next(line for line in printed([record()]).splitlines() if line.startswith(" lora "))
    assert "0.500" in row
    assert "±" not in row
    assert printed([]).strip() == ""


def test_no_best_rate_is_named_where_nothing_was_learned() -> None:
    learned = [record("lora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.3), (1e-2, 0.9), (1e-1, 0.1))]
    floor = [record("dora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.1), (1e-2, 0.05), (1e-1, None))]
    base = [record("pissa", r, 0, 0.25, untrained=0.3) for r in (1e-3, 1e-2, 1e-1)]
    summary = summarize_curves([*learned, *floor])
    found = {curve.label: curve for curve in summary.panels[0].curves}
    assert {label: curve.nothing_learned for label, curve in found.items()} == {"lora": False, "dora": True}
    text = show(summary)
    row = next(line for line in text.splitlines() if line.startswith(" dora "))
    assert row.split()[:3] == ["dora", "-", "nothing"]  # "learnt" stands in the next line
    assert row.split()[-1] == "-"
    assert "Nothing was learnt by dora." in " ".join(text.split())
    assert "best_log10_learning_rate.dora" not in describe_summary(summary).metrics
    assert "best_log10_learning_rate.lora" in describe_summary(summary).metrics
    assert "Nothing was learnt on letters on letters-base" in " ".join(printed(base).split())
    searched = summarize(StudyFile("s", "", "x", settings=AnalysisSettings("search")), [*learned, *floor])
    text = " ".join(show(searched).split())
    assert "dora has learnt nothing" in text
    assert "dora - (nothing" in text
    assert "dora's best is not bracketed" not in text
