"""The description of a study for MLflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic import record, study

from orchestrator.analyze.study_description import describe_study, describe_summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.study_file import StudyFile

STUDY = StudyFile("rates", "Which?", "python x.py")


def test_verdicts_come_first_in_their_own_words_and_as_numbers() -> None:
    verdicts = (
        Verdict("Tuned LoRA matches most.", "supported", "It does [0.1, 0.2].", "Letters, 10 replicates."),
        Verdict(
            "The rate matters most.",
            "undecided",
            "Not yet.",
            "Letters.",
            "Add seeds:",
            "python x.py --seeds 9",
        ),
        Verdict("At one rate the winner changes.", "descriptive", "It does.", "Letters."),
        Verdict("Ranks agree.", "refuted", "They do not.", "Letters."),
    )
    summary = replace(summarize(STUDY, study()), verdicts=verdicts)
    text, metrics = describe_summary(summary)
    for verdict in verdicts:
        assert f"### {verdict.outcome.capitalize()}: {verdict.heading}\n\n{verdict.answer}" in text
    assert "Add seeds:\n\n```\npython x.py --seeds 9\n```" in text
    assert text.index("Ranks agree.") < text.index("### Best points")
    assert {k: v for k, v in metrics.items() if k.startswith("verdict")} == {
        "verdict_1": 1.0,
        "verdict_2": 0.0,
        "verdict_4": -1.0,
    }


def test_the_best_points_of_a_grid_are_a_table_and_metrics() -> None:
    text, metrics = describe_study(STUDY, study())
    assert "### Best points: letters on letters-base" in text
    assert "| lora | 1e-2 | 0.967" in text
    assert metrics["best_log10_learning_rate.lora"] == pytest.approx(-2)
    assert metrics["best_validation_score.lora"] == pytest.approx(0.967, abs=1e-3)
    assert metrics["best_test_score.lora"] > 0.9


def test_the_best_points_of_panels_of_one_task_have_names_of_their_own() -> None:
    records = [record(steps=steps, validation=score) for steps, score in ((60, 0.5), (600, 0.75))]
    metrics = describe_study(STUDY, records).metrics
    name = "best_validation_score.lora.letters on letters-base (steps_horizon={})"
    assert (metrics[name.format(60)], metrics[name.format(600)]) == (0.5, 0.75)
