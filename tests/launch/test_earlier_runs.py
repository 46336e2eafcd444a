"""Settings that are fixed before there are results, and runs that a later command does not request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import record

from orchestrator.launch.earlier_runs import drop_abandoned, fix_settings, refuse_other_runs
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.util.errors import UsageError

PLANNED = AnalysisSettings(kind="replicates", max_replicates=20)
BEGUN = StudyFile("s", "?", "x", ("abc",), settings=PLANNED)


def test_the_planned_maximum_is_that_of_the_command_the_study_or_the_replicates() -> None:
    new, open_plan = StudyFile("s", "?", "x"), replace(PLANNED, max_replicates=0)
    assert fix_settings(open_plan, new, False, 10, ("lora",)).max_replicates == 10
    assert fix_settings(PLANNED, new, False, 10, ("lora",)).max_replicates == 20
    assert fix_settings(open_plan, BEGUN, False, 10, ("lora",)).max_replicates == 20


@pytest.mark.parametrize(
    ("change", "replicates", "message"),
    [
        ({"margin": 0.02}, 10, "--margin 0.02: study 's' began with 0.01"),
        ({"max_replicates": 30}, 10, "--max-replicates 30: study 's' began with 20"),
        ({}, 21, "--replicates 21: study 's' was planned for at most 20"),
    ],
)
def test_what_was_fixed_before_the_results_does_not_change(
    change: dict[str, float], replicates: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fix_settings(replace(PLANNED, **change), BEGUN, False, replicates, ("lora",))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_study_of_another_kind_is_refused() -> None:
    curve = replace(BEGUN, settings=AnalysisSettings())
    with pytest.raises(UsageError, match="another kind"):
        fix_settings(PLANNED, curve, False, 10, ("lora",))


def test_a_comparison_does_not_become_a_grid_or_a_search() -> None:
    for is_search in (False, True):
        with pytest.raises(UsageError, match="another kind"):
            fix_settings(AnalysisSettings(), BEGUN, is_search, 1, ("lora",))
    curve = replace(BEGUN, settings=AnalysisSettings())
    assert fix_settings(AnalysisSettings(), curve, True, 1, ("lora",)).kind == "search"


def test_configurations_that_an_earlier_command_left_without_a_record_leave_the_study(tmp_path: Path) -> None:
    """They would never end, so that the comparison would have no planned look."""
    store = Store(tmp_path)
    done = record("lora", 1e-3)
    store.put(done)
    study = StudyFile("s", "?", "x", (done.fingerprint, "old", "now"), reused=("old",))
    kept = drop_abandoned(study, PLANNED, ["now"], store)
    assert (kept.configurations, kept.reused) == ((done.fingerprint, "now"), ())
    assert drop_abandoned(study, AnalysisSettings(), ["now"], store) == study


def test_variants_that_nothing_verifies_are_named_in_the_settings() -> None:
    from variants import catalogue
    from variants.api import VerifiedBy

    found = fix_settings(PLANNED, StudyFile("s", "?", "x"), False, 10, catalogue.names()).unverified
    assert found == tuple(n for n in catalogue.names() if catalogue.get(n).verified_by is VerifiedBy.NONE)
    assert "lora" not in found


def test_the_points_of_a_search_form_no_curve() -> None:
    new = StudyFile("s", "?", "x")
    assert fix_settings(AnalysisSettings(), new, True, 1, ()).kind == "search"
    assert fix_settings(AnalysisSettings(), new, False, 1, ()).kind == "curve"
    assert fix_settings(PLANNED, new, True, 2, ("lora",)).kind == "replicates"


def test_a_comparison_with_runs_of_the_same_tunings_that_are_not_asked_for_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, of_another_rank = record("lora", seed=1), record("lora", seed=1, rank=4)
    store.put(mine)
    store.put(of_another_rank)
    study = StudyFile("s", "?", "x", (mine.fingerprint, of_another_rank.fingerprint, "untrained"))
    requested = templates = [mine.configuration]
    refuse_other_runs(study.keep([mine.fingerprint]), requested, templates, 2, store)
    refuse_other_runs(study, requested, templates, 1, store)  # seed 1 is of another replicate
    with pytest.raises(UsageError, match="--study 's': it has 1 runs of the same tunings"):
        refuse_other_runs(study, requested, templates, 2, store)
