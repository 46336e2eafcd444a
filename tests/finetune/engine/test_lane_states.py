"""The states of a lane, and its divergence."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    Script,
    configuration,
    leases,
    train,
)

from orchestrator.finetune.engine.lane import (
    TRANSITIONS,
    DivergenceDetector,
    IllegalTransitionError,
    Lane,
    LaneState,
)
from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report, evaluation_steps
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, DivergenceConfig, LRSchedule


def test_evaluation_steps() -> None:
    assert evaluation_steps(60, 4) == (15, 30, 45, 60)
    assert evaluation_steps(10, 3) == (3, 6, 10)
    assert evaluation_steps(2, 4) == (1, 2)
    assert evaluation_steps(5, 0) == (5,)


def test_illegal_transitions_are_refused() -> None:
    for here, there in itertools.product(LaneState, LaneState):
        lane = Lane(Lease(configuration(), 1))
        lane.state = here
        if there in TRANSITIONS[here]:
            lane.transition_to(there)
            assert lane.state is there
        else:
            with pytest.raises(IllegalTransitionError, match=f"from {here} to {there}"):
                lane.transition_to(there)
    assert not TRANSITIONS[LaneState.ENDED]


# Every example trains several lanes.
@settings(max_examples=settings.default.max_examples // 4)  # type: ignore[union-attr]
@given(st.data())
def test_under_any_directives_no_lane_is_lost(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    count = data.draw(st.integers(1, 4), label="lanes")
    lanes = [configuration(seed=s, steps=4, evaluations=data.draw(st.integers(1, 4))) for s in range(count)]
    lanes += [configuration(seed=9, rate=1e36, steps=4)] * data.draw(st.integers(0, 1), label="diverging")
    answer = st.sampled_from(
        [
            Directive.CONTINUE,
            Directive.CONTINUE,
            Directive.PARK,
            Directive.STOP,
            Directive.DROP,
            Directive.YIELD,
        ]
    )
    dropped: set[str] = set()
    parked_at: dict[str, int] = {}
    seen: dict[str, int] = {}

    def note(fingerprint: str, step: int, directive: Directive) -> Directive:
        if directive is Directive.DROP:
            dropped.add(fingerprint)
        if directive is Directive.PARK:
            parked_at[fingerprint] = step
        elif directive is not Directive.DROP:
            parked_at.pop(fingerprint, None)
        if directive is Directive.YIELD:
            source.leaving.add(fingerprint)
        return directive

    def answers(report: Report) -> Directive:
        assert report.fingerprint not in dropped
        step = source.lanes[report.fingerprint].step
        assert step == report.step or report.attempt > 1  # a resumed lane repeats its reports
        return note(report.fingerprint, step, data.draw(answer))

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        assert not dropped & set(steps), "a dropped lane is still held"
        for fingerprint, step in steps.items():
            assert step >= seen.get(fingerprint, 0)
            if fingerprint in parked_at:
                assert step == parked_at[fingerprint], "a parked lane has trained"
            seen[fingerprint] = step
        directives = {f: data.draw(answer) for f in steps if data.draw(st.booleans())}
        directives |= {
            f: Directive.CONTINUE
            for f in parked_at
            if f in steps and f not in directives and data.draw(st.booleans())
        }
        return {f: note(f, steps[f], a) for f, a in directives.items()}

    source = Random(leases(lanes), answers=answers, changes=changes)
    source.start_at = {c.fingerprint: data.draw(st.integers(0, 3)) for c in lanes[1:]}
    source.parked_at, source.leaving = parked_at, set()
    room = data.draw(st.integers(1, 3), label="room")
    train(source, store, lanes=room, spill_seconds=data.draw(st.sampled_from([-1.0, 3600.0]), label="spill"))
    assert max(map(len, source.held), default=0) <= room

    ended = [fingerprint for fingerprint, _, _ in source.ended]
    assert sorted(ended) == sorted(c.fingerprint for c in lanes if c.fingerprint not in dropped)
    assert_records_and_reports(source, store, lanes)


def assert_records_and_reports(source: Script, store: Store, lanes: list[Configuration]) -> None:
    for fingerprint, _, state in source.ended:
        record = store.get(fingerprint)
        assert record is not None
        assert record.state == state
    for one in lanes:
        # A lane whose lease was returned sends all its reports again, under its new attempt.
        mine = [r for r in source.reports if r.fingerprint == one.fingerprint]
        last = max((r.attempt for r in mine), default=1)
        for attempt in range(1, last + 1):
            steps = [r.step for r in mine if r.attempt == attempt]
            assert steps == sorted(set(steps))
            assert set(steps) <= set(evaluation_steps(one.lr_schedule.steps, one.evaluations))
        record = store.get(one.fingerprint)
        if record is not None and record.state == "finished":
            assert steps == list(evaluation_steps(one.lr_schedule.steps, one.evaluations))


class Random(Script):
    """A lane source that continues a parked lane only when the test draws a directive for that.

    When the trainer has no lane group, waiting lanes are leased regardless of `start_at`. A lane whose lease
    is returned waits again at once.
    """

    parked_at: dict[str, int]
    leaving: set[str]

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        if group_key is None:
            self.start_at = {}
        return super().lease(group_key, capacity, steps_taken)

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        self.parked.clear()
        return super().exchange(steps_taken)

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        super().return_lease(fingerprint, attempt)
        if fingerprint not in self.leaving:
            assert self.lanes[fingerprint].state is LaneState.PARKED
            del self.parked_at[fingerprint]
        self.leaving.discard(fingerprint)
        self.leases.append(Lease(self.lanes[fingerprint].configuration, attempt + 1))


RULE = DivergenceConfig(loss_ratio=1.5, share=0.1, smoothing=0.8)
SCHEDULE = LRSchedule(steps=50, warmup=0.1)  # 5 steps of warm-up, 5 steps of patience


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_reported_at_once_even_in_warmup(bad: float) -> None:
    assert "training loss" in (DivergenceDetector(RULE, SCHEDULE, 2.0).observe(0, bad, 1.0) or "")
    assert "gradient norm" in (DivergenceDetector(RULE, SCHEDULE, 2.0).observe(0, 1.0, bad) or "")


def test_a_loss_above_the_limit_for_a_tenth_of_the_steps_after_warmup_has_diverged() -> None:
    detector = DivergenceDetector(RULE, SCHEDULE, 2.0)
    results = [detector.observe(step, 3.01, 1.0) for step in range(10)]
    assert results[:9] == [None] * 9  # steps 0-4 are warm-up, steps 5-8 the first four above the limit
    assert "above 3" in (results[9] or "")


def test_one_smoothed_step_below_starts_the_count_anew() -> None:
    detector = DivergenceDetector(DivergenceConfig(smoothing=0.0), SCHEDULE, 2.0)
    losses = [9.0] * 9 + [1.0] + [9.0] * 4
    assert not any(detector.observe(step, loss, 1.0) for step, loss in enumerate(losses))
    assert detector.observe(14, 9.0, 1.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=49), st.data())
def test_state_through_json_changes_nothing(losses: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, first, second = (DivergenceDetector(RULE, SCHEDULE, 2.0) for _ in range(3))
    expected = [whole.observe(step, loss, 1.0) for step, loss in enumerate(losses)]
    found = [first.observe(step, loss, 1.0) for step, loss in enumerate(losses[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(cut + step, loss, 1.0) for step, loss in enumerate(losses[cut:])]
    assert found == expected
