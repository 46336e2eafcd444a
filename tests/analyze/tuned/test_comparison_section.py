"""Terminal, page and pictures of a replicated tuning, and the texts of its verdicts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from test_report import DATABASE, Page
from tuned_records import Truth, study_of, tuned_records

from orchestrator.analyze.curve_lines import MAX_OVERLAID_CURVES
from orchestrator.analyze.intervals import Interval
from orchestrator.analyze.plots.forest import x_limits
from orchestrator.analyze.plots.tuned_curves import draw_tuned_curves
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.table import render_summary
from orchestrator.record.schema import Record

TRUTHS = {
    "lora": Truth(),
    "pissa": Truth(0.85, -2.6),
    "hira": Truth(0.9, -1.0),
    "full": Truth(0.95, -3.0),
}


def two_tasks() -> list[Record]:
    records = [
        r for i, task in enumerate(("digits", "letters")) for r in tuned_records(TRUTHS, 7, task=task, seed=i)
    ]
    return [
        replace(r, state="diverged")
        if (r.configuration.variant.name, r.configuration.seed, r.configuration.task.name)
        == ("hira", 0, "digits")
        else r
        for r in records
    ]


@pytest.fixture(scope="module")
def summary() -> Summary:
    records = two_tasks()
    return summarize(study_of(records, max_replicates=7), records)


def printed(summary: Summary) -> str:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(render_summary(summary))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_every_number_whole_in_80_columns(summary: Summary) -> None:
    text = printed(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines() if line.startswith((" pissa ", " full ", " hira "))]
    assert ["worse", "yes", "7/7"] in [row[-3:] for row in rows]
    assert ["not", "counted", "7/7"] in [row[-3:] for row in rows]
    assert any(row[-1] == "6/7" for row in rows)
    assert "Over 2 tasks" in text


def test_the_verdicts_give_the_claim_the_numbers_and_the_design(summary: Summary) -> None:
    over, digits, letters, *fixed = summary.verdicts
    assert [v.scope for v in (over, digits, letters)] == ["2 tasks", "digits", "letters"]
    assert letters.heading == "Tuned LoRA matches or beats most variants (letters)."
    assert over.claim == digits.claim == letters.claim == "Tuned LoRA matches or beats most variants."
    assert over.answer.startswith("It holds on at least ")
    assert "2 tasks (digits on letters-base, letters on letters-base)" in over.design
    assert letters.answer.startswith("On letters it holds for at least ")
    assert "worse: pissa -5." in letters.answer or "worse: pissa -4." in letters.answer
    assert "on these 200 test items" in letters.answer, "the records have no results of single questions"
    assert "full" not in letters.answer, "a control is no variant"
    assert "The mean scores span 5" in letters.answer or "The mean scores span 4" in letters.answer
    assert "7 replicates" in letters.design
    assert "margin 1 points, simultaneous 95 % intervals" in letters.design
    (at_one_rate,) = fixed
    digits_part, letters_part = at_one_rate.answer.split("On letters, between LoRA's best rate and")
    assert "changes for hira" in letters_part
    assert "stays open" in digits_part, "a replicate of hira has diverged there"
    assert at_one_rate.outcome == "undecided", "the tasks have different outcomes"


def test_an_undecided_claim_names_the_replicates_in_the_worst_case_and_the_command() -> None:
    truths = {"lora": Truth(), "pissa": Truth(0.9, -2.4)}
    records = tuned_records(truths, 5, noise=0.01)
    planned = summarize(study_of(records, max_replicates=200), records).verdicts[0]
    assert planned.outcome == "undecided"
    assert "replicates decide every open comparison with probability 80 %" in planned.next_step
    assert "--replicates" in planned.next_command
    assert "--study" not in planned.next_command
    beyond = summarize(study_of(records, max_replicates=5), records).verdicts[0]
    assert "beyond the 5 planned" in beyond.next_step
    assert "--max-replicates" in beyond.next_command
    assert "--study t-" in beyond.next_command
    study = replace(study_of(records), configurations=("missing", *study_of(records).configurations))
    missing = summarize(study, records)
    assert missing.verdicts[0].next_step.startswith("Some configurations have not ended")
    assert any("have not ended" in warning for warning in missing.warnings)


def test_a_look_without_error_left_advises_a_new_study() -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth(0.9, -2.4)}, 5, noise=0.01)
    verdict = summarize(study_of(records, max_replicates=4), records).verdicts[0]
    assert verdict.outcome == "undecided"
    assert verdict.next_step.startswith("No error is left")
    assert verdict.next_command == ""


def test_no_number_of_replicates_is_promised_that_the_study_has_already() -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth(0.91, -2.0)}, 10, noise=0.002)
    summary = summarize(study_of(records, max_replicates=10), records)
    assert summary.comparison is not None
    row = summary.comparison.tasks[0].rows[1]
    assert (row.outcome, row.counts) == ("better", "open")
    assert row.replicates_to_decide is not None
    assert row.replicates_to_decide <= 10
    assert summary.verdicts[0].next_step.startswith("The margin lies in the interval of pissa")


def test_the_page_has_the_pictures_the_verdicts_and_every_tuning(tmp_path: Path) -> None:
    records = two_tasks()
    summary = write_report(study_of(records, max_replicates=7), records, tmp_path, DATABASE)
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"{name}.{ending}" for name in ("forest", "tuned_curves") for ending in ("png", "svg")}
    assert names == {"report.html", "summary.json", *pictures}
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    text = " ".join(page.text.split())
    for verdict in summary.verdicts:
        assert verdict.answer in text
        assert verdict.design in text
    for part in (
        "What one fixed learning rate for all would have shown",
        "Every tuning on digits",
        "equal variants would span",
    ):
        assert part in text
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert [task["task"] for task in numbers["comparison"]["tasks"]] == ["digits", "letters"]
    assert "NaN" not in json.dumps(numbers)
    image = Image.open(tmp_path / "forest.png")
    assert image.width == 1200


@pytest.mark.parametrize("variants", [MAX_OVERLAID_CURVES, 14])
def test_the_axes_of_many_variants_leave_room_for_their_curves(variants: int) -> None:
    truths = {name: Truth(0.9, -2.4) for name in ("lora", *(f"v{i}" for i in range(1, variants)))}
    records = tuned_records(truths, 3)
    comparison = summarize(study_of(records), records).comparison
    assert comparison is not None
    figure = draw_tuned_curves(comparison)
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert min(box.width, box.height) > 0.9 * figure.dpi, "no axes are smaller than 0.9 inches"


def test_one_replicate_gives_a_page_without_intervals(tmp_path: Path) -> None:
    records = tuned_records(TRUTHS, 1)
    summary = write_report(study_of(records), records, tmp_path, DATABASE)
    assert summary.verdicts[0].outcome == "undecided"
    assert "1 replicate is usable for both" in summary.verdicts[0].answer
    assert summary.verdicts[0].next_step.startswith("There is no interval for ")
    assert summary.comparison is not None
    assert summary.comparison.tasks[0].fixed_rate is None


def test_an_outlier_does_not_squeeze_the_other_variants_together() -> None:
    near = [(0.01, Interval(-0.01, 0.03)), (-0.01, Interval(-0.03, 0.01))]
    far = (-0.6, Interval(-0.7, -0.5))
    left, right = x_limits([*near, far], 0.01)
    assert left > -0.3, "the far one is not in the picture, an arrow points at it"
    assert all(left < value < right for value, _ in near)
    alone = x_limits(near, 0.01)
    assert right - left < 2 * (alone[1] - alone[0])
