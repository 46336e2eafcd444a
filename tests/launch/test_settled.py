"""What needs no training: one rule for the look-up, the designs, later stages, and the end of a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from points import POINTS, configuration, record, study_of

from orchestrator.execution.schedulers import scheduler_settings
from orchestrator.launch.designs import DesignInput, WideningGrid
from orchestrator.launch.reporting import print_missing_results
from orchestrator.launch.study import Study
from orchestrator.record.schema import MAX_FAILURES, Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

TEMPLATE, RATES = configuration(), (1e-4, 1e-3, 1e-2)
GRID = WideningGrid(DesignInput((TEMPLATE,), {"letters": RATES}), (0,), max_decades=1.0)
ASHA = StudyOptions(scheduler="asha")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def known(study: Study) -> list[list[Configuration]]:
    """Return what a study knows after a look-up, and what it trains."""
    study.look_up()
    return [study.satisfied, study.retries_exhausted, study.pending]


def scored(point: Configuration, state: str = "finished") -> Record:
    """Return a record that is better at a higher rate; a stopped one is of a study with ASHA."""
    scores = {"loss": 1.0, "exact_match": 10 * point.optimizer.learning_rate}
    made = replace(record(point, state), evaluations=(Evaluation(4, "validation", scores),))
    return replace(made, stopping_settings=scheduler_settings("asha", point)) if state == "stopped" else made


def fail(store: Store, point: Configuration, count: int = MAX_FAILURES) -> None:
    """Store failures of a configuration."""
    for _ in range(count):
        store.put(record(point, "failed"))


@pytest.mark.parametrize("failures", [0, 1, MAX_FAILURES])
def test_a_lane_that_asha_has_stopped_is_a_result_also_if_another_study_has_failed_it(
    store: Store, failures: int
) -> None:
    """The stage of the design ends with it, so that the grid grows."""
    study = study_of([], store, ASHA, design=GRID, templates=(TEMPLATE,))
    first, *others = GRID.request(lambda fingerprint: None)
    for point in others:
        store.put(scored(point))
    store.put(scored(first, "stopped"))
    fail(store, first, failures)
    satisfied, exhausted, pending = known(study)
    assert (satisfied[:3], exhausted) == ([first, *others], [])
    assert [c.optimizer.learning_rate for c in pending] == [1e-1]
    assert study.describe_progress().startswith(f"3 of {study.total} configurations are done")
    plain = study_of([], store, design=GRID, templates=(TEMPLATE,))
    assert first not in known(plain)[0], "without early stopping, it is no result"
    assert (first in plain.retries_exhausted) is (failures == MAX_FAILURES)


def test_a_later_stage_does_not_train_what_has_failed_too_often(store: Store) -> None:
    study = study_of([], store, design=GRID, templates=(TEMPLATE,))
    study.look_up()
    for point in study.pending:
        store.put(scored(point))
    worn, *new = study.name_next_stage()
    fail(store, worn)
    assert study.add([worn, *new]) == new
    assert study.retries_exhausted == [worn]
    assert worn not in study.pending
    assert study.file.reused == (worn.fingerprint,)
    for point in new:
        store.put(scored(point))
    assert worn.fingerprint not in {c.fingerprint for c in study.name_next_stage()}


def test_a_record_is_parsed_once_and_that_of_another_process_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    read = Store._read_json

    def spy(self: Store, path: Path) -> Any:
        parsed.append(path.name)
        return read(self, path)

    monkeypatch.setattr(Store, "_read_json", spy)
    grid = WideningGrid(GRID.given, (0,))
    first, second, third = grid.request(lambda fingerprint: None)
    study = study_of([], store, design=grid, templates=(TEMPLATE,))
    store.put(scored(first))
    fail(store, second)
    assert known(study) == [[first], [second], [third]]
    parsed.clear()
    assert known(study) == [[first], [second], [third]]
    assert parsed == []
    Store(store.root).put(scored(third))
    store.reset_failures(second.fingerprint)
    parsed.clear()
    assert known(study) == [[first, third], [], [second]]
    assert f"{first.fingerprint}.json" not in parsed


def test_a_plan_that_tries_again_what_has_failed_counts_it(store: Store) -> None:
    fail(store, POINTS[0])
    again = StudyOptions(plan=True, retry_failed=True)
    grid = WideningGrid(DesignInput((TEMPLATE,), {"letters": (1e-4,)}), (0,))
    for options, expected in ((StudyOptions(plan=True), 0), (again, 1)):
        study = study_of([], store, options, design=grid, templates=(TEMPLATE,))
        study.look_up()
        assert (study.num_to_train, study.total) == (expected, 1)


def test_a_run_that_a_limit_ends_goes_on_with_its_own_command(store: Store) -> None:
    """That of --only trains one configuration; study.json has the command of the whole study."""
    study = study_of(POINTS[:1], store, command="study --only 123")
    study.budget.request_stop()
    assert print_missing_results(study) == 3
    assert study.console.export_text().endswith("; to go on: study --only 123\n")
