"""The time of a trainer's process is divided among its lanes, without gaps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from scripted import Script, configuration, get_record, leases, train

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_timer import LaneTimer, process_start
from orchestrator.record.schema import TIME_FIELDS
from orchestrator.record.store import Store


def test_every_second_belongs_to_one_kind_and_is_shared_equally() -> None:
    first, second = (Lane(lease) for lease in leases([configuration(seed=0), configuration(seed=1)]))
    began = time.monotonic() - 8.0
    timer = LaneTimer(counted_until=began)
    timer.begin_work([])  # the time before the first lane is kept
    timer.begin_work([first, second])
    assert first.seconds["start_seconds"] == second.seconds["start_seconds"] >= 4.0
    timer.add([first], "train_seconds")
    timer.begin_work([first, second])
    timer.add([first, second], "evaluate_seconds")
    assert second.seconds["train_seconds"] == 0.0
    total = sum(first.seconds.values()) + sum(second.seconds.values())
    assert total == pytest.approx(timer.counted_until - began)


def test_records_say_where_the_time_of_their_trainer_went(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    began = time.monotonic()
    one = configuration(seed=0)
    train(Script(leases([one])), store, lanes=1)
    record = get_record(store, one)
    disjoint = [getattr(record.cost, name) for name in TIME_FIELDS if name != "generate_seconds"]
    assert all(seconds > 0 for seconds in disjoint)
    assert began - process_start() <= sum(disjoint) <= time.monotonic() - process_start()


def test_the_process_has_started_in_the_past() -> None:
    assert process_start() < time.monotonic()
