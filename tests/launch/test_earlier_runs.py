"""Settings that are fixed before there are results, and runs that a later command does not request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orchestrator.experiments.tuned_comparison import EXPERIMENT, ComparisonOptions
from points import configuration, study_of
from synthetic import record

from orchestrator.launch.earlier_runs import drop_abandoned, fix_settings, refuse_other_runs
from orchestrator.launch.study import Study
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

NEW = StudyFile("s", "?", "x")
BEGUN = replace(NEW, configurations=("abc",), settings=AnalysisSettings(kind="replicates"))
OF_A_CURVE = replace(BEGUN, settings=AnalysisSettings())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tuned(
    store: Store, file: StudyFile, points: Sequence[Configuration] = (configuration(),), **options: Any
) -> Study:
    """Return a comparison of tuned variants, by default with ten replicates."""
    chosen = ComparisonOptions(**{"replicates": 10, **options})
    return replace(study_of(points, store, chosen), experiment=EXPERIMENT, file=file)


def curve(store: Store, file: StudyFile, search: Any = "grid") -> Study:
    """Return a grid or a search over the learning rate."""
    return replace(study_of([configuration()], store, StudyOptions(search=search)), file=file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 0.02}, "--margin 0.02: study 's' began with 0.01"),
        ({"select": "published"}, "--select published: study 's' began with validation"),
    ],
)
def test_what_was_fixed_before_the_results_does_not_change(
    store: Store, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fix_settings(tuned(store, BEGUN, **change))
    assert "\n" not in str(caught.value)
    assert fix_settings(tuned(store, BEGUN, replicates=21)).margin == 0.01, "more replicates may be added"


def test_a_study_of_another_kind_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="another kind"):
        fix_settings(tuned(store, OF_A_CURVE))


def test_a_comparison_does_not_become_a_grid_or_a_search(store: Store) -> None:
    for search in ("grid", "random"):
        with pytest.raises(UsageError, match="another kind"):
            fix_settings(curve(store, BEGUN, search))
    assert fix_settings(curve(store, OF_A_CURVE, "random")).kind == "search"


def test_configurations_that_an_earlier_command_left_without_a_record_leave_the_study(store: Store) -> None:
    """They would never end, so that no answer would be final."""
    done, now = record("lora", 1e-3), configuration()
    store.put(done)
    file = replace(BEGUN, configurations=(done.fingerprint, "old", now.fingerprint), reused=("old",))
    kept = drop_abandoned(tuned(store, file, [now]))
    assert (kept.configurations, kept.reused) == ((done.fingerprint, now.fingerprint), ())
    of_a_curve = replace(file, settings=AnalysisSettings())
    assert drop_abandoned(curve(store, of_a_curve)) == of_a_curve


def test_variants_that_nothing_verifies_are_named_in_the_settings(store: Store) -> None:
    from variants import catalogue
    from variants.api import VerifiedBy

    point = configuration()
    every = [replace(point, variant=replace(point.variant, name=name)) for name in catalogue.names()]
    found = fix_settings(tuned(store, NEW, every)).unverified
    assert found == tuple(n for n in catalogue.names() if catalogue.get(n).verified_by is VerifiedBy.NONE)
    assert "lora" not in found


def test_the_points_of_a_search_form_no_curve(store: Store) -> None:
    assert fix_settings(curve(store, NEW, "random")).kind == "search"
    assert fix_settings(curve(store, NEW)).kind == "curve"
    assert fix_settings(tuned(store, NEW, search="random")).kind == "replicates"


def test_a_comparison_with_runs_of_the_same_tunings_that_are_not_asked_for_is_refused(store: Store) -> None:
    mine, of_another_rank = record("lora", seed=1), record("lora", seed=1, rank=4)
    store.put(mine)
    store.put(of_another_rank)
    points, one, both = [mine.configuration], (mine.fingerprint,), (of_another_rank.fingerprint, "untrained")
    refuse_other_runs(tuned(store, replace(BEGUN, configurations=one), points))
    study = tuned(store, replace(BEGUN, configurations=one + both), points, replicates=2)
    with pytest.raises(UsageError, match="--study 's': it has 1 runs of the same tunings"):
        refuse_other_runs(study)
    refuse_other_runs(replace(study, options=StudyOptions()))  # seed 1 is of another replicate
