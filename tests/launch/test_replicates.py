"""Shifted grids and further replicates of a replicated tuning, and settings that are fixed beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from points import configuration
from synthetic import record

from orchestrator.launch.design import DesignInput
from orchestrator.launch.replicated_tuning import ReplicatesDesign, grid_offset, shifted_grid
from orchestrator.launch.run_study import drop_abandoned
from orchestrator.launch.study_settings import fix_settings
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.rates import parse_learning_rates
from orchestrator.util.errors import UsageError

RATES = parse_learning_rates(["1e-4:1e-1:2"])
TASKS = ("letters", "digits")


def given(rates: tuple[float, ...] = RATES) -> DesignInput:
    templates = [
        replace(configuration(variant), task=replace(configuration().task, name=task))
        for task in TASKS
        for variant in ("lora", "hira")
    ]
    return DesignInput(None, tuple(templates), dict.fromkeys(TASKS, rates))


def design(replicates: int = 3, rates: tuple[float, ...] = RATES) -> list[Configuration]:
    return ReplicatesDesign(given(rates), replicates).request({})


def test_every_replicate_has_its_seed_and_as_many_rates_that_all_variants_and_tasks_share() -> None:
    found = design()
    assert len({c.fingerprint for c in found}) == len(found) == 3 * 2 * 2 * len(RATES)
    for replicate in range(3):
        grids = {
            tuple(c.optimizer.learning_rate for c in found if (c.task.name, c.variant.name, c.seed) == key)
            for key in ((task, v, replicate) for task in TASKS for v in ("lora", "hira"))
        }
        (grid,) = grids
        assert len(grid) == len(RATES)
    assert ReplicatesDesign(given(), 3).outline() == found


def test_further_replicates_and_rates_leave_the_earlier_runs_as_they_are() -> None:
    few, many = design(2), design(5)
    assert many[: len(few)] == few
    wider = {c.fingerprint for c in design(2, parse_learning_rates(["1e-5:1:2"]))}
    assert {c.fingerprint for c in few} <= wider


def test_offsets_are_spread_over_one_spacing_and_keep_the_spacing() -> None:
    offsets = [grid_offset(k) for k in range(400)]
    assert -0.5 <= min(offsets) < -0.45
    assert 0.45 < max(offsets) < 0.5
    assert abs(sum(offsets) / len(offsets)) < 0.05
    for k in range(20):
        grid = shifted_grid(RATES, k)
        assert all(abs(math.log10(b / a) - 0.5) < 0.01 for a, b in pairwise(grid))
        assert math.log10(grid[0] / RATES[0]) == pytest.approx(0.5 * grid_offset(k), abs=0.01)
        assert all(float(f"{rate:.3g}") == rate for rate in grid)


def test_an_uneven_list_of_rates_keeps_its_order() -> None:
    uneven = (1e-4, 3e-4, 1e-2)
    for k in range(20):
        grid = shifted_grid(uneven, k)
        assert list(grid) == sorted(grid)
        assert len(set(grid)) == 3


def test_one_rate_and_rates_that_are_too_close_are_refused() -> None:
    with pytest.raises(UsageError, match="letters has 1 rate"):
        design(2, (1e-3,))
    with pytest.raises(UsageError, match="closer than a shift"):
        design(5, (1e-3, 1.001e-3, 1.002e-3))


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
