"""The terminal: verdicts first, then tables of at most 80 columns."""

from __future__ import annotations

import io
import shlex

from rich.console import Console
from synthetic import record, study, summarize_curves

from orchestrator.analyze.results import Summary
from orchestrator.analyze.study_description import describe_summary
from orchestrator.analyze.table import render_summary
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record


def printed(records: list[Record]) -> str:
    return show(summarize_curves(records))


def show(summary: Summary) -> str:
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=False)
    console.print(render_summary(summary))
    return console.export_text()


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


def test_no_best_rate_is_named_where_nothing_was_learned() -> None:
    learned = [record("lora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.3), (1e-2, 0.9), (1e-1, 0.1))]
    floor = [record("dora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.1), (1e-2, 0.05), (1e-1, None))]
    summary = summarize_curves([*learned, *floor])
    found = {curve.label: curve for curve in summary.panels[0].curves}
    assert {label: curve.nothing_learned for label, curve in found.items()} == {"lora": False, "dora": True}
    row = next(line for line in show(summary).splitlines() if line.startswith(" dora "))
    assert row.split()[1] == row.split()[-1] == "-"
    assert "best_log10_learning_rate.dora" not in describe_summary(summary).metrics
    assert "best_log10_learning_rate.lora" in describe_summary(summary).metrics
