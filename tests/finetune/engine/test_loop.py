"""The loop on a real tiny Llama: lanes that start, end, wait, fail and resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripted import (
    POISONED,
    WORDS_TASK,
    Script,
    SimulatedCrashError,
    configuration,
    crash_at,
    get_record,
    leases,
    numbers_of,
    saved_step,
    solo,
    tiny_base_model,
    train,
)

from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.engine.loop import process_start
from orchestrator.finetune.failures import TrainerBrokenError
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.schema import TIME_FIELDS
from orchestrator.record.store import Store, adapter_file_name
from orchestrator.study.configuration import Configuration, DivergenceConfig, ModelChoice

# -- lanes are independent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["letters", WORDS_TASK])
def test_lanes_that_start_0_3_and_7_steps_apart_equal_their_solo_runs(
    task: str, store: Store, tmp_path: Path
) -> None:
    three = [
        configuration(task=task, seed=0, steps=12, evaluations=3),
        configuration(task=task, seed=1, rate=3e-3, steps=9, evaluations=2),
        configuration(task=task, seed=0, rate=3e-2, alpha=4.0, steps=6, evaluations=1),
    ]
    late = {three[1].fingerprint: 3, three[2].fingerprint: 7}
    train(Script(leases(three), start_at=late), store)
    for one in three:
        record = get_record(store, one)
        assert record.state == "finished"
        assert numbers_of(record) == numbers_of(solo(one, tmp_path))
    assert get_record(store, three[2]).provenance.lane_group_size == 3


def test_every_batch_of_an_evaluation_counts_as_progress(store: Store, tmp_path: Path) -> None:
    """Heartbeats end some time after the last progress, and an evaluation may last longer."""
    one = configuration(steps=2, evaluations=1, batch_size=8)
    source = Script(leases([replace(one, task=replace(one.task, validation_size=400))]))
    train(source, store, data=tmp_path / "data")
    assert source.progress >= 2 * (7 + 1), "validation and test, before training and after it"


def test_dropout_is_a_function_of_the_lanes_own_step(store: Store, tmp_path: Path) -> None:
    two = [configuration(seed=s, dropout=0.2, accumulation=2, steps=6) for s in (0, 1)]
    train(Script(leases(two), start_at={two[1].fingerprint: 2}), store)
    for one in two:
        assert numbers_of(get_record(store, one)) == numbers_of(solo(one, tmp_path))


def test_a_lane_with_a_nonfinite_loss_ends_and_the_others_are_unchanged(store: Store, tmp_path: Path) -> None:
    good = [configuration(seed=s, steps=8) for s in (0, 1)]
    bad = configuration(seed=0, rate=1e36, steps=8)
    source = Script(leases([good[0], bad, good[1]]))
    train(source, store)
    record = get_record(store, bad)
    assert record.state == "diverged"
    assert "in step" in record.reason
    assert record.steps < 4
    assert record.score("test") == bad.task.floor
    assert not (store.checkpoints / bad.fingerprint).exists()
    for one in good:
        assert numbers_of(get_record(store, one)) == numbers_of(solo(one, tmp_path))
    assert {f for f, _, state in source.ended if state == "diverged"} == {bad.fingerprint}


def test_a_lane_that_stays_above_the_untrained_loss_diverges(store: Store) -> None:
    # A random tiny base is bounded by its norms: its loss cannot rise far above ln 25, so the limit is low.
    bad = replace(
        configuration(rate=3.0, steps=40, evaluations=4), divergence=DivergenceConfig(loss_ratio=0.9)
    )
    train(Script(leases([bad])), store)
    record = get_record(store, bad)
    assert record.state == "diverged"
    assert "above" in record.reason
    assert record.steps < 40
    assert record.steps == len(record.curve) - 1  # the step that showed the divergence was not taken
    assert all(math.isfinite(s.loss) for s in record.curve)


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    whole = solo(configuration(batch_size=16, steps=6), tmp_path)
    parts = solo(configuration(batch_size=8, accumulation=2, steps=6), tmp_path)
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
    assert whole.cost.tokens == parts.cost.tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss(dtype: str, tmp_path: Path) -> None:
    record = solo(configuration(rate=1e-2, dtype=dtype, steps=30, batch_size=16), tmp_path)
    assert record.state == "finished"
    last = [each for each in record.evaluations if each.split == "test"][-1]
    assert last.scores["loss"] < record.baseline_scores["test"]["loss"] - 0.1


def test_learning_rate_groups_and_the_curve(tmp_path: Path) -> None:
    record = solo(configuration(rate=1e-2, steps=20), tmp_path)
    assert [s.step for s in record.curve] == list(range(1, 21))
    rates = [step.learning_rate for step in record.curve]
    assert rates[:2] == pytest.approx([0.0, 1e-2])  # 5 % of 20 steps: one step of warm-up
    assert record.curve[-1].learning_rate < 1e-4
    assert record.cost.trainable_parameters > 0
    assert record.cost.tokens == 20 * 8 * 6
    assert record.cost.peak_memory > 2**26, "on a CPU, that of the process, torch included"


# -- interruption -------------------------------------------------------------------------------------------


def to_be_interrupted(variant: str) -> Configuration:
    return configuration(variant=variant, steps=12, evaluations=3, dropout=0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store in which lanes were trained without interruption."""
    store = Store(tmp_path_factory.mktemp("whole"))
    for variant in ("lora", "pissa"):
        train(Script(leases([to_be_interrupted(variant)])), store, adapters=store.adapters)
    return store


FEW = [(1, "lora"), (4, "pissa"), (7, "lora"), (11, "pissa")]


@pytest.mark.parametrize(("stop_at", "variant"), FEW)
def test_a_resumed_lane_equals_an_uninterrupted_one(
    stop_at: int, variant: str, store: Store, whole: Store
) -> None:
    one = to_be_interrupted(variant)

    def die(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if steps[one.fingerprint] >= stop_at:
            raise SimulatedCrashError
        return {}

    with pytest.raises(SimulatedCrashError):
        train(Script(leases([one]), changes=die), store, save_when=lambda lane: True)
    assert store.get(one.fingerprint) is None
    train(Script(leases([one], attempt=2)), store, adapters=store.adapters)
    record, expected = get_record(store, one), get_record(whole, one)
    assert numbers_of(record) == numbers_of(expected)
    assert record.provenance.resumed_from == (stop_at,)
    assert record.provenance.attempt == 2
    adapters = [each.adapters / adapter_file_name(one.fingerprint) for each in (store, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_reports_are_sent_again_after_a_resumption(store: Store) -> None:
    one = configuration(steps=12, evaluations=4)

    crash_at(9, [one], store)
    source = Script(leases([one], attempt=2), answers=lambda report: Directive.PARK)
    train(source, store)
    assert [r.step for r in source.reports] == [3, 6, 9, 12]
    assert {r.attempt for r in source.reports} == {2}
    record = get_record(store, one)
    assert record.provenance.resumed_from == (9,)
    assert tuple(step for r in source.reports for step in r.curve) == record.curve


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-9] + bytes(9)], ids=["cut", "zeros"]
)
def test_a_lane_with_a_damaged_checkpoint_resumes_from_the_one_before(
    store: Store, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    one = configuration(steps=12, evaluations=4)

    crash_at(9, [one], store)
    last = store.checkpoints / one.fingerprint / "1" / "step-00000009.safetensors"
    last.write_bytes(damage(last.read_bytes()))
    source = Script(leases([one], attempt=2))
    train(source, store)
    (line,) = source.said
    assert line.startswith(f"skipped the damaged checkpoint {last}: ")
    record = get_record(store, one)
    assert record.provenance.resumed_from == (6,)
    assert numbers_of(record) == numbers_of(solo(one, tmp_path))


# -- directives ---------------------------------------------------------------------------------------------


def test_a_stopped_lane_keeps_its_checkpoint_and_can_resume(store: Store, tmp_path: Path) -> None:
    one = configuration(steps=12, evaluations=4)
    source = Script(
        [Lease(one, 1, "asha")], answers=lambda r: Directive.STOP if r.step == 6 else Directive.CONTINUE
    )
    train(source, store)
    record = get_record(store, one)
    assert (record.state, record.steps, record.stopping_settings) == ("stopped", 6, "asha")
    assert (record.stopped_at, record.reason) == (6, "stopped by the scheduler after step 6")
    assert record.score("test") is None
    assert source.ended == [(one.fingerprint, 1, "stopped")]
    assert saved_step(store.checkpoints, one) == 6
    train(Script([Lease(one, 2, "asha")]), store)
    assert numbers_of(get_record(store, one)) == numbers_of(solo(one, tmp_path))
    assert not (store.checkpoints / one.fingerprint).exists()


def test_a_dropped_lane_has_no_record(store: Store) -> None:
    one, other = configuration(steps=12, evaluations=4), configuration(seed=1, steps=12, evaluations=4)
    drop = {one.fingerprint: Directive.DROP}
    source = Script(leases([one, other]), answers=lambda r: drop.get(r.fingerprint, Directive.CONTINUE))
    train(source, store)
    assert store.get(one.fingerprint) is None
    assert [r.step for r in source.reports if r.fingerprint == one.fingerprint] == [3]
    assert source.ended == [(other.fingerprint, 1, "finished")]


def test_a_parked_lane_does_not_train_while_another_one_does(store: Store, tmp_path: Path) -> None:
    parked, other = configuration(steps=8, evaluations=2), configuration(seed=1, steps=8, evaluations=1)
    seen: list[int] = []

    def hold(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if other.fingerprint in steps and steps.get(parked.fingerprint) == 4:
            seen.append(steps[other.fingerprint])
            return {parked.fingerprint: Directive.PARK}
        return {parked.fingerprint: Directive.CONTINUE}

    train(Script(leases([parked, other]), answers=lambda r: Directive.PARK, changes=hold), store)
    assert seen == [4, 5, 6, 7]
    for one in (parked, other):
        assert numbers_of(get_record(store, one)) == numbers_of(solo(one, tmp_path))


# -- failures -----------------------------------------------------------------------------------------------


def test_a_lane_that_cannot_be_added_fails_alone(store: Store) -> None:
    good = configuration(steps=4)
    bad = [
        configuration(steps=4, rank=400),
        replace(good, task=replace(good.task, revision="of another machine")),
        configuration(steps=4, variant="lora", max_length=2),
        replace(good, variant=replace(good.variant, name="lorra")),
    ]
    source = Script(leases([bad[0], good, *bad[1:]]))
    train(source, store)
    assert sorted(source.ended) == sorted(
        [(b.fingerprint, 1, "failed") for b in bad] + [(good.fingerprint, 1, "finished")]
    )
    for one, words in zip(bad, ["rank 400", "of another machine", "max_length 2", "lorra"], strict=True):
        record = get_record(store, one)
        assert words in record.reason
        assert "Traceback" in record.traceback


def test_a_trainer_on_which_every_lane_fails_ends_after_three(store: Store) -> None:
    """The base model cannot be loaded. Three lanes fail with this error, and the others stay in the queue."""

    def gone(choice: ModelChoice, task: Task) -> BaseModel:
        raise OSError("the base is gone")

    source = Script(leases(configuration(seed=seed) for seed in range(8)))
    with pytest.raises(
        TrainerBrokenError, match=r"3 configurations in a row failed with OSError: the base is gone"
    ):
        train(source, store, load_base_model=gone)
    assert [state for _, _, state in source.ended] == ["failed"] * 3
    assert len(source.leases) == 5


def test_only_the_lane_whose_own_step_raises_fails(store: Store, tmp_path: Path) -> None:
    from orchestrator.finetune.data.batches import shuffled_indices as order

    path = tmp_path / "poisoned.py"
    path.write_text(POISONED)
    # Five steps use 40 of the 64 examples, so some seeds draw example 5 and others do not.
    draws_example_5 = {seed: 5 in order(seed, 64, 0, 40) for seed in range(8)}
    failing = [s for s in draws_example_5 if draws_example_5[s]][:1]
    unaffected = [s for s in draws_example_5 if not draws_example_5[s]][:2]
    lanes = {s: configuration(task=str(path), seed=s, steps=5) for s in (*failing, *unaffected)}
    source = Script(leases(lanes.values()))
    train(source, store)
    failed = get_record(store, lanes[failing[0]])
    assert failed.state == "failed"
    assert "IndexError" in failed.reason
    assert failed.steps == order(failing[0], 64, 0, 40).index(5) // 8
    for seed in unaffected:
        record = get_record(store, lanes[seed])
        assert record.state == "finished"
        assert numbers_of(record) == numbers_of(solo(lanes[seed], tmp_path))


def test_the_base_model_is_loaded_once_and_left_unchanged(store: Store) -> None:
    loaded = []

    def load(choice, task):  # type: ignore[no-untyped-def]
        loaded.append(tiny_base_model(choice))
        return loaded[-1]

    shapes = [configuration(steps=3, rank=rank, seed=seed) for rank in (2, 4) for seed in (0, 1)]
    train(Script(leases(shapes)), store, load_base_model=load)
    assert len(loaded) == 1
    fresh = tiny_base_model(shapes[0].model).model
    assert [n for n, _ in loaded[0].model.named_modules()] == [n for n, _ in fresh.named_modules()]
    for (name, mine), (_, other) in zip(
        loaded[0].model.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, other), name
    assert {get_record(store, c).state for c in shapes} == {"finished"}


def test_records_say_where_the_time_of_their_trainer_went(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    began = time.monotonic()
    one = configuration(seed=0)
    train(Script(leases([one])), store, lanes=1)
    record = get_record(store, one)
    disjoint = [getattr(record.cost, name) for name in TIME_FIELDS if name != "generate_seconds"]
    assert all(seconds > 0 for seconds in disjoint)
    assert began - process_start() <= sum(disjoint) <= time.monotonic() - process_start()
