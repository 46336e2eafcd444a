"""What a trainer measures: the time of its lanes, how many fit, and whether waiting for answers pays."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import (
    WORDS_TASK,
    Script,
    configuration,
    get_record,
    leases,
    numbers_of,
    solo,
    tiny_base_model,
    train,
)

from orchestrator.finetune.engine import answer_wait
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.finetune.engine.rounds import process_start
from orchestrator.finetune.engine.slots import MEASURED_STEPS, MEMORY_SHARE, LaneMemory, MeasuredLanes
from orchestrator.finetune.evaluation import evaluate as evaluation
from orchestrator.record.schema import TIME_FIELDS
from orchestrator.record.store import Store


def test_records_say_where_the_time_of_their_trainer_went(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    began = time.monotonic()
    one = configuration(seed=0)
    train(Script(leases([one])), store, lanes=1)
    record = get_record(store, one)
    disjoint = [getattr(record.cost, name) for name in TIME_FIELDS if name != "generate_seconds"]
    assert all(seconds > 0 for seconds in disjoint)
    assert began - process_start() <= sum(disjoint) <= time.monotonic() - process_start()


GIB = 2**30


class MeasuredEngine(Engine):
    """An engine on the CPU whose steps have the peak memory of a GPU: 2 GiB, and 3 GiB for each lane.

    The first step after a lane was added needs 50 GiB more, as an initialization may.
    """

    memory_limit = 20 * GIB
    lanes_before = 0

    def take_peak_memory(self) -> int:
        lanes = len(self.lane_group.adapters.lanes) if self.has_lane_group else 0
        extra = 50 * GIB * (lanes > self.lanes_before)
        self.lanes_before = lanes
        return (2 + 3 * lanes) * GIB + extra


def peaks(one: int, two: int) -> LaneMemory:
    return LaneMemory({1: [10**15, *[one] * MEASURED_STEPS], 2: [10**15, *[two] * MEASURED_STEPS]})


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 500), st.integers(0, 10_000))
def test_the_chosen_lanes_fit_and_one_more_would_not_or_would_not_pay(
    shared: int, lane: int, memory: int, tokens: int
) -> None:
    found = peaks(shared + lane, shared + 2 * lane).choose(memory, tokens)
    assert 1 <= found.lanes <= min(found.fitting, 8)
    assert found.fitting == 1 or shared + found.fitting * lane <= MEMORY_SHARE * memory
    assert shared + (found.fitting + 1) * lane > MEMORY_SHARE * memory
    if found.lanes < min(found.fitting, 8):
        assert found.lanes * tokens <= 9_000 or found.lanes == 2
        assert (found.lanes + 1) * tokens > 9_000


@pytest.mark.slow
def test_a_trainer_measures_one_lane_then_two_then_grows_and_the_next_one_knows(
    store: Store, tmp_path: Path
) -> None:
    ten = [configuration(seed=seed, steps=12) for seed in range(10)]
    source = Script(leases(ten))
    train(source, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    sizes = [len(steps) for steps in source.held]
    # 0.9 x 20 GiB hold 2 GiB and 5 lanes of 3 GiB.
    assert sizes[: 2 * (MEASURED_STEPS + 1)] == [1] * (MEASURED_STEPS + 1) + [2] * (MEASURED_STEPS + 1)
    assert max(sizes) == 5
    assert [line for line in source.said if "lanes at once" in line] == [
        f"5 lanes at once on {device_key(store)}: one lane needs 5.0 GiB, two 8.0: 5 fit"
    ]
    for one in ten:
        record = get_record(store, one)
        assert numbers_of(record) == numbers_of(solo(one, tmp_path)), "the number of lanes changes no result"
    later = Script(leases(configuration(seed=seed, steps=4) for seed in range(10, 20)))
    train(later, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    assert len(later.held[0]) == 5
    typed = Script(leases(configuration(seed=seed, steps=4) for seed in range(20, 30)))
    train(typed, store, lanes=7, make_engine=MeasuredEngine)
    assert len(typed.held[0]) == 7, "a measurement is no limit of a typed number"


def device_key(store: Store) -> str:
    (path,) = store.lane_capacity.glob("*.json")
    return str(json.loads(path.read_text())["device_key"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is measured")
def test_steps_on_a_gpu_are_measured(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(choice: object, task: object) -> object:
        base_model = tiny_base_model(configuration().model)
        return replace(base_model, model=base_model.model.cuda(), device=torch.device("cuda", 0))

    source = Script(leases(configuration(seed=seed, steps=12) for seed in range(10)))
    found: list[MeasuredLanes] = []
    write = LaneRecorder.write_measured_lanes

    def spy(self: LaneRecorder, group_key: str, measured: MeasuredLanes) -> None:
        found.append(measured)
        write(self, group_key, measured)

    monkeypatch.setattr(LaneRecorder, "write_measured_lanes", spy)
    train(source, store, lanes=8, is_measured=True, load_base_model=load)
    (measured,) = found
    assert 0 < measured.one_lane_bytes < measured.two_lanes_bytes < GIB
    assert max(map(len, source.held)) == measured.lanes == 8


STEPS = 8
FIRST, SECOND = (configuration(seed=seed, steps=STEPS, task=WORDS_TASK) for seed in (0, 1))
DELAY = 2
"""Steps by which the second lane is behind the first."""


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every generation of answers appends its number of lanes."""
    lanes: list[int] = []
    generate = evaluation.generate_answers

    def counting(*arguments: Any) -> Any:
        lanes.append(len(arguments[4].seeds))
        return generate(*arguments)

    monkeypatch.setattr(evaluation, "generate_answers", counting)
    return lanes


def script_durations(monkeypatch: pytest.MonkeyPatch, step: float, generation: float) -> None:
    """Let every round of steps, and every generation of answers, take these seconds by the clock."""
    for module, seconds in ((answer_wait, step), (evaluation, generation)):
        monkeypatch.setattr(module, "monotonic", count(0.0, seconds).__next__)


def train_two(store: Store, source: Script | None = None) -> Script:
    source = source or Script(leases([FIRST, SECOND]), start_at={SECOND.fingerprint: DELAY})
    train(source, store, lanes=2)
    return source


def check_records(store: Store, folder: Path) -> None:
    for one in (FIRST, SECOND):
        record = get_record(store, one)
        assert numbers_of(record) == numbers_of(solo(one, folder))


@pytest.mark.parametrize(
    ("generation", "last"),
    [(10.0, [2, 2]), (0.5, [1, 1, 1, 1])],
    ids=["steps are cheap", "steps are expensive"],
)
def test_a_lane_waits_while_that_is_cheaper_than_generating_twice(
    generation: float,
    last: list[int],
    generated: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`last` has the lanes of each generation of the last evaluations, validation and test."""
    solo(FIRST, tmp_path)
    solo(SECOND, tmp_path)
    generated.clear()
    script_durations(monkeypatch, step=1.0, generation=generation)
    store = Store(tmp_path / "store")
    train_two(store)
    # Before them come the untrained model, unless another test has stored its scores, and the first
    # evaluation of each lane.
    assert generated[-len(last) - 2 :] == [1, 1, *last]
    check_records(store, tmp_path)


@pytest.mark.parametrize("directive", [Directive.YIELD, Directive.PARK, Directive.DROP, Directive.STOP])
def test_a_waiting_lane_obeys_every_directive(
    directive: Directive, generated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane that is saved while it waits has taken all its steps, and only its answers are left to do."""
    script_durations(monkeypatch, step=1.0, generation=10.0)
    sent: list[Mapping[str, int]] = []

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if steps.get(FIRST.fingerprint) == STEPS and not sent:
            sent.append(dict(steps))
            return {FIRST.fingerprint: directive}
        if directive is Directive.PARK and sent and FIRST.fingerprint in steps:
            return {FIRST.fingerprint: Directive.CONTINUE}
        return {}

    store = Store(tmp_path / "store")
    source = Script(leases([FIRST, SECOND]), start_at={SECOND.fingerprint: DELAY}, changes=changes)
    train_two(store, source)
    assert sent[0][FIRST.fingerprint] == STEPS > sent[0][SECOND.fingerprint] > 0
    record = store.get(FIRST.fingerprint)
    if directive is Directive.STOP:
        assert record is not None
        assert record.state == "stopped"
    elif directive is Directive.PARK:
        check_records(store, tmp_path)
    else:
        assert record is None
        train(Script([Lease(FIRST, 2)]), store, lanes=1)
        check_records(store, tmp_path)
        if directive is Directive.YIELD:
            assert store.get(FIRST.fingerprint).provenance.resumed_from == (STEPS,)  # type: ignore[union-attr]
