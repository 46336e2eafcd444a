"""The points that a search asks for, counts and writes to its journal, without a cluster."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from points import configuration, study_of
from ray.tune.search import Searcher
from search_drive import Drive, asked, build, journal, record, score, space

from orchestrator.execution.search import JOURNAL_FILE, Point, open_search


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_every_variant_gets_as_many_points_in_blocks_of_a_lane_group(tmp_path: Path, sampler: str) -> None:
    drive = Drive(tmp_path, space("rank=4,8,16"), points=16, sampler=sampler, lanes=4)
    assert drive.all() == {"lora": 16, "hira": 16}
    assert len({point.fingerprint for point in drive.given}) == 32
    names = [point.variant.name for point in drive.given]
    assert names == [*["lora"] * 4, *["hira"] * 4] * 4
    written = [t.user_attrs["fingerprint"] for v in ("lora", "hira") for t in drive.optuna_trials(v)]
    assert written == [p.fingerprint for v in ("lora", "hira") for p in drive.given if p.variant.name == v]


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_every_replicate_is_a_search_of_its_own(tmp_path: Path, sampler: str) -> None:
    alone = Drive(tmp_path, space(variants=("lora",)), points=4, sampler=sampler)
    alone.all(at_once=2)
    more = Drive(tmp_path, space(), points=4, sampler=sampler, replicates=3)
    more.all(at_once=2)
    points = list(more.budget.configurations.values())
    assert Counter((p.variant.name, p.seed) for p in points) == {
        (v, r): 4 for v in ("lora", "hira") for r in range(3)
    }
    assert points[:4] == alone.given, "replicate 0 of the first task is the search without replicates"
    seeds = [p.seed for p in more.given]
    assert seeds == sorted(seeds), "one replicate is searched after another"
    names = {"lora", "hira", "lora/1", "hira/1", "lora/2", "hira/2"}
    assert set(journal(more.study)) == names
    if sampler == "qmc":  # equal for the variants of a replicate, different between replicates
        rates = {
            (v, r): [p.optimizer.learning_rate for p in points if (p.variant.name, p.seed) == (v, r)]
            for v in ("lora", "hira")
            for r in range(3)
        }
        assert all(rates["lora", r] == rates["hira", r] for r in range(3))
        assert not set(rates["lora", 0]) & set(rates["lora", 1])


def test_a_further_task_and_further_replicates_leave_the_first_search_as_it_is(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), points=3)
    first.all()
    over, letters = space(variants=("lora",)), build("lora", {})
    digits = replace(letters, task=replace(letters.task, name="digits"))
    spaces = {"digits": over, "letters": over}
    again = open_search(first.study, "tpe", 3, spaces, [digits, letters], replicates=2)
    assert list(again.groups) == ["digits/lora", "lora", "digits/lora/1", "lora/1"]
    assert list(again.configurations.values()) == first.given
    assert [group.num_remaining for group in again.groups.values()] == [3, 0, 3, 3]


def test_tpe_draws_points_near_good_results(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=40)
    drive.all(at_once=2)
    late = [abs(math.log10(p.optimizer.learning_rate) + 2) for p in drive.given[20:]]
    assert sorted(late)[len(late) // 2] < 0.7, "uniform in four decades: 1.0"


def test_a_point_is_in_the_journal_before_it_is_returned(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space())
    seen: list[list[str]] = []
    drive.budget.on_point = lambda point: seen.append(asked(drive.study))
    drive.all()
    assert [len(each) for each in seen] == list(range(1, 13))
    assert all(point.fingerprint in each for point, each in zip(drive.given, seen, strict=True))


def test_a_point_that_failed_three_times_counts_and_is_not_tried_again(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)))
    first.ask()
    for _ in range(3):
        first.store.put(record(first.given[0], "failed"))
    second = Drive(tmp_path, space(variants=("lora",)))
    assert [t.state.name for t in second.optuna_trials("lora")] == ["FAIL"]
    assert second.all() == {"lora": 5}


def test_a_new_point_that_has_failed_three_times_elsewhere_is_a_failure_and_is_not_trained(
    tmp_path: Path,
) -> None:
    drive = Drive(tmp_path, space("learning_rate=1e-3,1e-2", variants=("lora",)), points=2)
    worn = build("lora", {"learning_rate": 1e-3})
    for _ in range(3):
        drive.store.put(record(worn, "failed"))
    study = study_of([], drive.store, search=drive.budget, templates=(worn,))
    drive.budget.on_point = lambda point: study.add([point])
    assert drive.all() == {"lora": 1}
    assert sorted(t.state.name for t in drive.optuna_trials("lora")) == ["COMPLETE", "FAIL"]
    assert (study.retries_exhausted, study.pending) == ([worn], drive.given)


def test_a_result_of_another_study_counts_and_is_not_trained(tmp_path: Path) -> None:
    other = Drive(tmp_path, space("rank=4,8,16", "learning_rate=1e-3,1e-2", variants=("lora",)), points=3)
    other.all()
    (other.study / JOURNAL_FILE).unlink()
    drive = Drive(tmp_path, space("rank=4,8,16", "learning_rate=1e-3,1e-2", variants=("lora",)), points=6)
    assert drive.all() == {"lora": 3}
    assert len(drive.budget.configurations) == 6
    known = {point.fingerprint for point in other.given}
    assert drive.cached == known
    values = [t.value for t in drive.optuna_trials("lora") if t.state.name == "COMPLETE"]
    assert sorted(values) == sorted(score(point) for point in drive.budget.configurations.values())


def test_the_journal_is_only_appended_to(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(), points=4)
    path = drive.study / JOURNAL_FILE
    before, start = path.stat().st_ino, path.read_bytes()
    drive.all()
    written = path.read_bytes()
    more = Drive(tmp_path, space(), points=6)
    assert more.all() == {"lora": 2, "hira": 2}
    assert path.stat().st_ino == before
    assert written.startswith(start)
    assert path.read_bytes().startswith(written)


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    for sampler in ("tpe", "qmc"):
        open_search(tmp_path, sampler, 3, {"letters": space()}, [build(v, {}) for v in ("lora", "hira")])
    assert not list(tmp_path.iterdir())


def test_no_more_trials_are_unfinished_than_the_limit_which_may_change(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=2)
    drive.search.max_concurrent = 1
    assert [drive.ask(), drive.ask()] == [*drive.given, None]
    drive.search.max_concurrent = 9
    assert [drive.ask(), drive.ask()] == [drive.given[1], None], "a trial may still die"
    for trial in list(drive.running):
        drive.end(trial)
    assert drive.ask() == Searcher.FINISHED


def test_a_point_whose_trial_died_too_often_is_suggested_by_the_next_run(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=1)
    drive.ask()
    drive.search.on_trial_complete(drive.running.popitem()[0], error=True)
    assert drive.ask() == Searcher.FINISHED
    assert [t.state.name for t in drive.optuna_trials("lora")] == ["RUNNING"]
    assert Drive(tmp_path, space(variants=("lora",)), points=1).ask() == drive.given[0]


@pytest.mark.parametrize(("value", "state"), [(0.5, "COMPLETE"), (math.nan, "FAIL"), (None, "FAIL")])
def test_a_sampler_learns_from_finite_scores_only(value: float | None, state: str) -> None:
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    Point(configuration(), study._storage, trial._trial_id).tell(TrialState.COMPLETE, value)
    assert [each.state.name for each in study.trials] == [state]
