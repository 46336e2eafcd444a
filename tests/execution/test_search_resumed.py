"""A search after the death of its driver, or with other options, without a cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from search_drive import STEPS, Drive, asked, build, record, score, space

from orchestrator.execution.search import JOURNAL_FILE, open_search
from orchestrator.study.configuration import Configuration, LRSchedule
from orchestrator.util.errors import UsageError


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_a_killed_search_continues_asks_for_no_point_twice_and_keeps_to_the_budget(
    tmp_path: Path, sampler: str
) -> None:
    over = space("rank=4,8,16")
    first = Drive(tmp_path, over, points=20, sampler=sampler)
    for _ in range(24):
        first.ask()
    for trial in list(first.running)[:20]:
        first.end(trial, "diverged" if trial == "t3" else "finished")
    lost = {point.fingerprint for point in first.running.values()}
    assert len(lost) == 4

    second = Drive(tmp_path, over, points=20, sampler=sampler)
    for variant in ("lora", "hira"):
        values = [t.value for t in second.optuna_trials(variant) if t.state.name == "COMPLETE"]
        mine = [p for p in first.given if p.variant.name == variant and p.fingerprint not in lost]
        assert sorted(values) == sorted(0.0 if p is first.given[3] else score(p) for p in mine)
    again = [second.ask() for _ in range(4)]
    assert {point.fingerprint for point in again if isinstance(point, Configuration)} == lost
    waiting = [t.state.name for v in ("lora", "hira") for t in second.optuna_trials(v)]
    assert waiting.count("RUNNING") == 4
    second.all()
    asked = [*first.given, *second.given[4:]]
    assert len({point.fingerprint for point in asked}) == len(asked) == 40
    assert Counter(point.variant.name for point in asked) == {"lora": 20, "hira": 20}
    rates = {point.optimizer.learning_rate for point in first.given}
    assert not any(point.optimizer.learning_rate in rates for point in second.given[4:8])

    third = Drive(tmp_path, over, points=20, sampler=sampler)
    assert third.ask() == Searcher.FINISHED
    more = Drive(tmp_path, over, points=21, sampler=sampler)
    assert more.all() == {"lora": 1, "hira": 1}


def test_stopped_points_are_pruned_at_once_and_after_a_restart(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    for _ in range(3):
        first.ask()
    first.end("t0", "stopped")
    first.end("t1", "finished")
    pruned = [t for t in first.optuna_trials("lora") if t.state.name == "PRUNED"]
    assert [t.intermediate_values for t in pruned] == [{30: score(first.given[0])}]

    second = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    again = [t for t in second.optuna_trials("lora") if t.state.name == "PRUNED"]
    assert [(t.value, t.intermediate_values) for t in again] == [
        (t.value, t.intermediate_values) for t in pruned
    ]
    # Known points come first, because they fill the scheduler's rungs, then the lost point. The sampler gets
    # each result once.
    assert [second.ask() for _ in range(3)] == first.given
    del second.running["t0"]
    second.search.on_trial_result("t0", {"step": 30, "score": 0.0})
    second.search.on_trial_complete("t0", {"step": 30, "score": 0.0, "state": "training", "done": True})
    assert [t.value for t in second.optuna_trials("lora") if t.state.name == "PRUNED"] == [pruned[0].value]
    assert second.all() == {"lora": 6}

    full = Drive(tmp_path, space(variants=("lora",)))
    assert full.all() == {"lora": 1}, "without early stopping what was stopped goes on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"over": space("rank=4,8")}, "lora's rank in 4,8,16, now it would be 4,8"),
        ({"over": space()}, "rank in 4,8,16, now it would be nothing"),
        ({"sampler": "cma-es"}, "has searched with tpe, not cma-es"),
    ],
)
def test_another_space_or_sampler_is_another_study(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    Drive(tmp_path, space("rank=4,8,16")).all()
    with pytest.raises(UsageError, match=message) as caught:
        Drive(tmp_path, **({"over": space("rank=4,8,16")} | change))
    assert "take another --study" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_settings_are_another_study(tmp_path: Path) -> None:
    Drive(tmp_path, space()).all()

    longer = [replace(build(v, {}), lr_schedule=LRSchedule(2 * STEPS)) for v in ("lora", "hira")]
    with pytest.raises(UsageError, match="other settings"):
        open_search(tmp_path / "study", "tpe", 6, {"letters": space()}, longer)


def test_a_further_variant_joins_with_the_same_budget(tmp_path: Path) -> None:
    Drive(tmp_path, space(variants=("lora",))).all()
    assert Drive(tmp_path, space()).all() == {"hira": 6}


def test_a_driver_that_is_killed_in_any_write_leaves_a_search_that_goes_on(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(), points=2)
    first.all()
    written = (first.study / JOURNAL_FILE).read_bytes()
    ends = [at + 1 for at, byte in enumerate(written) if byte == ord("\n")]
    for end in (0, *ends, *(end - 20 for end in ends)):
        folder = tmp_path / f"killed-{end}"
        (folder / "study").mkdir(parents=True)
        (folder / "study" / JOURNAL_FILE).write_bytes(written[:end])
        before = asked(folder / "study")
        second = Drive(folder, space(), points=2)
        assert set(before) <= set(second.budget.configurations)
        second.all()
        points = asked(second.study)
        assert len(set(points)) == len(points) == 4
        assert {point.fingerprint for point in second.given} == set(points), (
            "none has a record, all are trained"
        )
        assert all(t.state.name == "COMPLETE" for v in ("lora", "hira") for t in second.optuna_trials(v))


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), points=2)
    first.all()
    path = first.study / JOURNAL_FILE
    written = path.read_bytes()
    for damaged in (
        b"{}\n" + written,
        b"\xff\n" + written,
        written.replace(b'"fingerprint":"', b'"fingerprint":"0'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="another --study") as caught:
            Drive(tmp_path, space(variants=("lora",)), points=2)
        assert "\n" not in str(caught.value)


def test_a_lock_that_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)))
    first.ask()
    lock = Path(f"{first.study / JOURNAL_FILE}.lock")
    lock.symlink_to(first.study / JOURNAL_FILE)
    second = Drive(tmp_path, space(variants=("lora",)))
    assert second.all() == {"lora": 6}
    assert not lock.is_symlink()


def test_a_design_keeps_to_its_budget_when_another_variant_brings_a_dimension(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("full",)), points=16, sampler="qmc")
    assert len(first.budget.configurations) == 16
    second = Drive(tmp_path, space("rank=4,8", variants=("full", "lora")), points=32, sampler="qmc")
    assert {name: group.num_asked for name, group in second.budget.groups.items()} == {"full": 32, "lora": 32}
    assert list(second.budget.configurations)[:16] == list(first.budget.configurations)


def test_fewer_points_than_before_are_refused(tmp_path: Path) -> None:
    Drive(tmp_path, space(variants=("lora",)), points=16)
    with pytest.raises(UsageError, match=r"--points 8: .* asks for 16 .* take 16 or more") as caught:
        Drive(tmp_path, space(), points=8)
    assert "\n" not in str(caught.value)


def test_records_that_trainers_of_a_killed_driver_wrote_are_used(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    for _ in range(2):
        first.ask()
    second = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    second.store.put(record(first.given[1]))  # after the store was read
    assert [second.ask() for _ in range(2)] == first.given
    assert second.cached == {first.given[1].fingerprint}
    assert Counter(t.state.name for t in second.optuna_trials("lora")) == {"COMPLETE": 1, "RUNNING": 1}


def test_a_point_whose_record_is_gone_is_trained_again_and_counts_once(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)))
    first.all()
    path = first.study / JOURNAL_FILE
    written = path.read_bytes()
    first.store.record_path(first.given[2].fingerprint).unlink()
    second = Drive(tmp_path, space(variants=("lora",)))
    assert second.budget.total == 6
    assert second.all() == {"lora": 1}
    assert second.given == [first.given[2]]
    assert path.read_bytes() == written


def test_a_point_that_failed_is_tried_again_by_the_next_run_and_its_result_is_told(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), points=2)
    first.ask()
    first.end("t0", "failed")
    assert [t.state.name for t in first.optuna_trials("lora")] == ["RUNNING"]
    second = Drive(tmp_path, space(variants=("lora",)), points=2)
    assert second.all() == {"lora": 2}
    assert second.given[0] == first.given[0]
    assert [t.state.name for t in second.optuna_trials("lora")] == ["COMPLETE", "COMPLETE"]


def test_results_are_told_even_if_nothing_is_left_to_train(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), points=2)
    for point in (first.ask(), first.ask()):
        assert isinstance(point, Configuration)
        first.store.put(record(point))
    second = Drive(tmp_path, space(variants=("lora",)), points=2)
    assert [t.value for t in second.optuna_trials("lora")] == [score(point) for point in first.given]
    assert second.ask() == Searcher.FINISHED
