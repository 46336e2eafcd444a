"""--select published: the test set chooses the rate, for GLUE also the evaluation; outputs have a mark."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic import record

from orchestrator.analyze.published.published_selection import LABEL, MARK, mark_published, select_published
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile


def study(select: str) -> StudyFile:
    settings = AnalysisSettings(select=select)  # type: ignore[arg-type]
    return StudyFile("mine", "?", "command", settings=settings)


def two_rates() -> list[Record]:
    """Return runs at two rates: validation scores prefer the lower rate, test scores the higher one."""
    lower = [record("lora", 1e-3, seed, 0.8, 0.5) for seed in range(2)]
    return lower + [record("lora", 1e-2, seed, 0.6, 0.7) for seed in range(2)]


@pytest.mark.parametrize(("select", "rate", "score"), [("validation", 1e-3, 0.5), ("published", 1e-2, 0.7)])
def test_the_split_that_chooses_is_the_one_that_is_asked_for(select: str, rate: float, score: float) -> None:
    summary = summarize(study(select), two_rates())
    (curve,) = summary.panels[0].curves
    assert curve.best_rate == rate
    assert curve.best_test.mean == pytest.approx(score)
    assert summary.panels[0].title.endswith(LABEL) == (select == "published")
    assert any(warning.startswith(MARK) for warning in summary.warnings) == (select == "published")


def evaluated(scores: list[float]) -> Record:
    """Return a run that was scored on the test split at every evaluation."""
    one = record("lora", 1e-2, 0, 0.5, 0.5, task="glue_rte")
    metric = one.configuration.task.metric
    tests = [Evaluation(10 * (i + 1), "test", {metric: score, "loss": 1.0}) for i, score in enumerate(scores)]
    validations = [replace(e, split="validation", scores={metric: 0.1}) for e in tests]
    configuration = replace(one.configuration, test_evaluations="every")
    return replace(
        one,
        fingerprint=configuration.fingerprint,
        configuration=configuration,
        evaluations=(*validations, *tests),
    )


def test_the_best_evaluation_of_a_run_counts_where_all_scored_the_test_split() -> None:
    chosen = select_published(evaluated([0.2, 0.9, float("nan"), 0.4]))
    assert chosen.configuration.fingerprint == chosen.fingerprint, "the label is no part of the identity"
    assert (chosen.score("validation"), chosen.score("test")) == (0.9, 0.9)
    assert evaluated([0.2, 0.9, 0.4]).score("test") == 0.4, "without it the last one counts"


def test_states_without_a_test_score_stay_as_they_are() -> None:
    diverged = select_published(record("lora", 1e-2, 0, None, None, state="diverged", floor=0.1))
    assert (diverged.score("validation"), diverged.score("test")) == (0.1, 0.1)
    failed = select_published(record("lora", 1e-2, 0, None, None, state="failed"))
    assert failed.score("validation") is None


def test_every_verdict_and_the_first_warning_say_how_rates_were_chosen() -> None:
    verdict = Verdict("A claim.", "supported", "An answer.", "A design.")
    summary = Summary(panels=(), states={}, provenance={}, warnings=("Another.",), verdicts=(verdict,))
    marked = mark_published(summary, [evaluated([0.5])])
    assert marked.verdicts[0].design == f"A design. {MARK}"
    assert marked.warnings[0].startswith(MARK)
    assert "of the best evaluation of a run" in marked.warnings[0]
    assert marked.warnings[1:] == ("Another.",)
