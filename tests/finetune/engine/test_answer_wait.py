"""Lanes at their last step wait for others, if generating the answers of all together saves time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from scripted import WORDS_TASK, Script, configuration, get_record, leases, numbers_of, solo, train

from orchestrator.finetune.engine import answer_wait
from orchestrator.finetune.engine.answer_wait import AnswerWait
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.evaluation import evaluate as evaluation
from orchestrator.record.store import Store

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


def test_a_lane_does_not_wait_if_there_is_memory_for_one_lane_only(
    generated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_durations(monkeypatch, step=1.0, generation=10.0)
    monkeypatch.setattr(LaneGroup, "count_lanes_generated_together", lambda *_: 1)
    train_two(Store(tmp_path / "store"))
    assert set(generated) == {1}


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


def test_no_lane_waits_if_none_trains_or_nothing_is_measured() -> None:
    lanes = [Lane(lease) for lease in leases([FIRST, SECOND])]
    for lane, step in zip(lanes, (STEPS - 3, 0), strict=True):
        lane.step = step
    assert not AnswerWait(1.0, 10.0).is_worthwhile([])
    assert not AnswerWait(None, 10.0).is_worthwhile(lanes)
    assert not AnswerWait(1.0, None).is_worthwhile(lanes)
    assert AnswerWait(1.0, 3.1).is_worthwhile(lanes)  # the nearest lane decides: three steps
    assert not AnswerWait(1.0, 3.0).is_worthwhile(lanes)
