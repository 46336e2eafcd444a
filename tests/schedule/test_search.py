"""The search's delegate with real OptunaSearch and a real store, without a cluster: what it asks for, what it
counts, how it goes on after its driver's death. The objective is a formula."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from points import configuration
from ray.tune.search import Searcher

from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.schedule import sampling
from orchestrator.schedule.ledger import Ledger, opened
from orchestrator.schedule.search import PerGroupSearch
from orchestrator.schedule.search_file import FILE, POINTS, SearchFile
from orchestrator.study.configuration import Configuration, Schedule
from orchestrator.study.errors import BadInput
from orchestrator.study.space import Space, Value, applied, parse

STEPS = 90
OWN: dict[str, dict[str, Value]] = {
    "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
    "hira": {"rank": 8, "dropout": 0.0},
    "full": {},
}
ASHA = "asha loss=min first=30 eta=4 last=30"


def build(variant: str, values: Mapping[str, Value]) -> Configuration:
    point = replace(configuration(variant), schedule=Schedule(STEPS), evaluations=3)
    return applied(point, values)


def space(*words: str, variants: tuple[str, ...] = ("lora", "hira")) -> Space:
    return parse(words, variants, OWN.__getitem__, (1e-4, 1.0))


def score(point: Configuration) -> float:
    """Best at a learning rate of 1e-2 and rank 16."""
    rate = abs(math.log10(point.optimizer.learning_rate) + 2)
    return round(1 - rate / 4 - abs(point.variant.rank - 16) / 64, 6)


def record(point: Configuration, state: str = "finished") -> Record:
    steps = 30 if state == "stopped" else STEPS
    seen = tuple(
        Evaluation(s, "validation", {"loss": 1.0, "exact_match": score(point)})
        for s in range(30, steps + 1, 30)
    )
    stopped = {"scheduler": ASHA, "stopped_at": 30} if state == "stopped" else {}
    return Record(point.fingerprint, point, state, steps, evaluations=seen, **stopped)  # type: ignore[arg-type]


class Drive:
    """Tune, as the delegate sees it. `known` plays run.py's part."""

    def __init__(
        self,
        folder: Path,
        over: Space,
        points: int = 6,
        sampler: str = "tpe",
        scheduler: str = "none",
        lanes: int = 2,
    ) -> None:
        self.store = Store(folder / "store")
        self.study = folder / "study"
        self.study.mkdir(exist_ok=True)
        self.ledger: Ledger = opened(self.study, sampler, points, over, build, STEPS)
        self.ledger.keep()
        asha = ASHA if scheduler == "asha" else ""
        known = {f for f in self.ledger.asked if self.store.meets(f, asha)}
        self.search = PerGroupSearch(self.ledger, self.store, scheduler, lanes, known)
        self.running: dict[str, Configuration] = {}
        self.given: list[Configuration] = []
        self.calls = 0

    def ask(self) -> Configuration | str | None:
        trial = f"t{self.calls}"
        self.calls += 1
        found = self.search.suggest(trial)
        if not isinstance(found, dict):
            return found
        point = Configuration.from_json(found["configuration"])
        self.running[trial] = point
        self.given.append(point)
        return point

    def end(self, trial: str, state: str = "finished") -> None:
        """The lane ends; its record comes first."""
        point = self.running.pop(trial)
        self.store.put(record(point, state))
        result: dict[str, Any] = {"step": 30, "score": score(point), "state": "training"}
        if state == "stopped":
            self.search.on_trial_complete(trial, {**result, "done": True})
            return
        self.search.on_trial_result(trial, result)
        value = 0.0 if state == "diverged" else score(point)
        self.search.on_trial_complete(trial, {**result, "step": STEPS, "state": state, "score": value})

    def all(self, at_once: int = 4) -> Counter[str]:
        """Runs to the end; the points of each variant."""
        while True:
            found = self.ask() if len(self.running) < at_once else None
            if found == Searcher.FINISHED and not self.running:
                return Counter(point.variant.name for point in self.given)
            if not isinstance(found, Configuration):
                assert self.running, "nothing runs and nothing can be suggested"
                self.end(next(iter(self.running)))

    def told(self, variant: str) -> list[Any]:
        """Optuna's trials of a variant."""
        return self.search.groups[variant].optuna._ot_study.trials  # type: ignore[union-attr]


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_every_variant_gets_as_many_points_in_blocks_of_a_pack(tmp_path: Path, sampler: str) -> None:
    drive = Drive(tmp_path, space("rank=4,8,16"), points=16, sampler=sampler, lanes=4)
    assert drive.all() == {"lora": 16, "hira": 16}
    assert len({point.fingerprint for point in drive.given}) == 32
    names = [point.variant.name for point in drive.given]
    assert names == [*["lora"] * 4, *["hira"] * 4] * 4
    assert [p.fingerprint for p in SearchFile.read(drive.study).asked] == [  # type: ignore[union-attr]
        point.fingerprint for point in drive.given
    ]


def test_tpe_looks_where_it_was_good(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=40)
    drive.all(at_once=2)
    late = [abs(math.log10(p.optimizer.learning_rate) + 2) for p in drive.given[20:]]
    assert sorted(late)[len(late) // 2] < 0.7, "uniform in four decades: 1.0"


def test_a_point_is_written_down_before_anyone_gets_it(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space())
    seen: list[list[str]] = []
    drive.ledger.told = lambda point: seen.append(
        [json.loads(line)["fingerprint"] for line in (drive.study / POINTS).read_text().splitlines()]
    )
    drive.all()
    assert [len(each) for each in seen] == list(range(1, 13))
    assert [each[-1] for each in seen] == [point.fingerprint for point in drive.given]


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_it_goes_on_after_its_death_asks_nothing_again_and_keeps_to_the_budget(
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
        values = [t.value for t in second.told(variant) if t.state.name == "COMPLETE"]
        mine = [p for p in first.given if p.variant.name == variant and p.fingerprint not in lost]
        assert sorted(values) == sorted(0.0 if p is first.given[3] else score(p) for p in mine)
    again = [second.ask() for _ in range(4)]
    assert {point.fingerprint for point in again if isinstance(point, Configuration)} == lost
    waiting = [t.state.name for v in ("lora", "hira") for t in second.told(v)]
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


def test_what_was_stopped_is_told_as_pruned_at_once_and_after_a_restart(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    for _ in range(3):
        first.ask()
    first.end("t0", "stopped")
    first.end("t1", "finished")
    pruned = [t for t in first.told("lora") if t.state.name == "PRUNED"]
    assert [t.intermediate_values for t in pruned] == [{0: score(first.given[0])}]

    second = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    again = [t for t in second.told("lora") if t.state.name == "PRUNED"]
    assert [(t.value, t.intermediate_values) for t in again] == [
        (t.value, t.intermediate_values) for t in pruned
    ]
    # What is known comes first, for the scheduler's rungs; then what was lost; the sampler hears of it once.
    assert [second.ask() for _ in range(3)] == first.given
    del second.running["t0"]
    second.search.on_trial_result("t0", {"step": 30, "score": 0.0})
    second.search.on_trial_complete("t0", {"step": 30, "score": 0.0, "state": "training", "done": True})
    assert [t.value for t in second.told("lora") if t.state.name == "PRUNED"] == [pruned[0].value]
    assert second.all() == {"lora": 6}

    full = Drive(tmp_path, space(variants=("lora",)))
    assert full.all() == {"lora": 1}, "without early stopping what was stopped goes on"


def test_what_failed_three_times_counts_and_is_not_tried_again(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)))
    first.ask()
    for _ in range(3):
        first.store.put(record(first.given[0], "failed"))
    second = Drive(tmp_path, space(variants=("lora",)))
    assert [t.state.name for t in second.told("lora")] == ["FAIL"]
    assert second.all() == {"lora": 5}


def test_a_result_of_another_study_counts_and_is_not_trained(tmp_path: Path) -> None:
    other = Drive(tmp_path, space("rank=4,8,16", "learning_rate=1e-3,1e-2", variants=("lora",)), points=3)
    other.all()
    (other.study / FILE).unlink()
    drive = Drive(tmp_path, space("rank=4,8,16", "learning_rate=1e-3,1e-2", variants=("lora",)), points=6)
    assert drive.all() == {"lora": 3}
    assert len(drive.ledger.asked) == 6
    known = {point.fingerprint for point in other.given}
    assert drive.search.known == known
    values = [t.value for t in drive.told("lora") if t.state.name == "COMPLETE"]
    assert sorted(values) == sorted(score(point) for point in drive.ledger.asked.values())


def test_a_small_space_is_used_up_and_said_to_be(tmp_path: Path) -> None:
    over = parse(["rank=4,8,16"], ("lora", "full"), OWN.__getitem__, (1e-2,), ("learning_rate",))
    drive = Drive(tmp_path, over, points=9)
    assert drive.ledger.total == 4
    assert drive.all() == {"lora": 3, "full": 1}
    assert Drive(tmp_path, over, points=9).ask() == Searcher.FINISHED


@pytest.mark.parametrize(
    ("points", "sampler", "seed"),
    [
        # Every pair of values.
        (12, "tpe", 0),
        (20, "cma-es", 0),
        (20, "tpe", 1),
        (12, "cma-es", 1),
        (12, "tpe", 2),
        (20, "cma-es", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (20, "tpe", 0),
                (12, "cma-es", 0),
                (12, "tpe", 1),
                (20, "cma-es", 1),
                (20, "tpe", 2),
                (12, "cma-es", 2),
            )
        ),
    ],
)
def test_choices_give_as_many_different_points_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int, sampler: str, seed: int
) -> None:
    """Samplers come back to their best points: of twenty they suggest ten."""
    monkeypatch.setattr(sampling, "SEED", seed)
    over = parse(
        ["learning_rate=1e-4,1e-3,1e-2,1e-1", "rank=4,8,16,32,64"], ("lora", "hira"), OWN.__getitem__, ()
    )
    drive = Drive(tmp_path, over, points, sampler)
    assert drive.all() == {"lora": points, "hira": points}
    assert len({point.fingerprint for point in drive.given}) == 2 * points
    assert not drive.ledger.file.exhausted
    for variant in over.variants:
        told = [t for t in drive.told(variant) if t.state.name == "COMPLETE"]
        mine = [p for p in drive.given if p.variant.name == variant]
        assert sorted(t.value for t in told) == sorted(map(score, mine)), "each is told once"


def test_a_point_that_the_sampler_does_not_find_is_asked_and_counts(tmp_path: Path) -> None:
    """A driver's death after 19 of 20: the last one is found, and only then is the space used up."""
    over = parse(["learning_rate=1e-4,1e-3,1e-2,1e-1", "rank=4,8,16,32,64"], ("lora",), OWN.__getitem__, ())
    assert Drive(tmp_path, over, points=19).all() == {"lora": 19}
    assert Drive(tmp_path, over, points=30).all() == {"lora": 1}
    last = Drive(tmp_path, over, points=30)
    assert last.ask() == Searcher.FINISHED
    assert len(last.ledger.asked) == last.ledger.total == 20


def test_the_only_point_that_a_variant_takes_is_found(tmp_path: Path) -> None:
    def picky(variant: str, values: Mapping[str, Value]) -> Configuration | None:
        return build(variant, values) if values["rank"] == 7 else None

    over = parse(["rank=int:1:2000"], ("lora",), OWN.__getitem__, (1e-2,), ("learning_rate",))
    drive = Drive(tmp_path, over, points=2)
    drive.ledger.build = picky
    drive.all()
    assert [point.variant.rank for point in drive.given] == [7]
    assert drive.ledger.file.exhausted == ("lora",)


def test_a_large_space_that_is_refused_throughout_ends(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), points=2)
    drive.ledger.build = lambda variant, values: None
    assert drive.ask() == Searcher.FINISHED
    assert drive.ledger.file.exhausted == ("lora",)


def test_a_variant_that_refuses_most_points_ends(tmp_path: Path) -> None:
    def picky(variant: str, values: Mapping[str, Value]) -> Configuration | None:
        return build(variant, values) if values["rank"] == 8 else None

    over = parse(["rank=int:1:2000"], ("lora",), OWN.__getitem__, (1e-2,), ("learning_rate",))
    drive = Drive(tmp_path, over, points=2)
    drive.ledger.build = picky
    drive.all()
    assert drive.ledger.file.exhausted == ("lora",)
    assert drive.ledger.total == len(drive.given) <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"over": space("rank=4,8")}, "lora's rank in 4,8,16, now it would be 4,8"),
        ({"over": space()}, "rank in 4,8,16, now it would be nothing"),
        ({"sampler": "cma-es"}, "has searched with tpe, not cma-es"),
    ],
)
def test_another_space_or_sampler_is_another_study(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    Drive(tmp_path, space("rank=4,8,16")).all()
    with pytest.raises(BadInput, match=said) as caught:
        Drive(tmp_path, **({"over": space("rank=4,8,16")} | change))
    assert "take another --study" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_settings_are_another_study(tmp_path: Path) -> None:
    Drive(tmp_path, space()).all()

    def longer(variant: str, values: Mapping[str, Value]) -> Configuration:
        return replace(build(variant, values), schedule=Schedule(2 * STEPS))

    with pytest.raises(BadInput, match="other settings"):
        opened(tmp_path / "study", "tpe", 6, space(), longer, 2 * STEPS)


def test_raised_numerics_are_named(tmp_path: Path) -> None:
    Drive(tmp_path, space()).all()

    def raised(variant: str, values: Mapping[str, Value]) -> Configuration:
        point = build(variant, values)
        return replace(point, variant=replace(point.variant, numerics=2), loop_numerics=3)

    with pytest.raises(BadInput, match=r"earlier numerics of the variant lora and loop: .* another --study"):
        opened(tmp_path / "study", "tpe", 6, space(), raised, STEPS)


def test_a_further_variant_joins_with_the_same_budget(tmp_path: Path) -> None:
    Drive(tmp_path, space(variants=("lora",))).all()
    assert Drive(tmp_path, space()).all() == {"hira": 6}


def test_the_spent_budget_is_written_down(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    for _ in range(3):
        drive.ask()
    drive.end("t0", "stopped")
    drive.end("t1")
    spent = drive.ledger.spent(drive.store)["lora"]
    assert (spent.points, spent.asked) == (6, 3)
    assert spent.states == {"stopped": 1, "finished": 1, "missing": 1}
    assert (spent.steps, spent.most_steps) == (30 + STEPS, 6 * STEPS)
    assert SearchFile.read(drive.study).spent["lora"] == spent  # type: ignore[union-attr]


def test_a_torn_last_line_was_given_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Drive(tmp_path, space(variants=("lora",)))
    for _ in range(4):
        first.ask()
    path = first.study / POINTS
    path.write_bytes(path.read_bytes()[:-20])
    second = Drive(tmp_path, space(variants=("lora",)))
    assert [r.message for r in caplog.records] == [f"{path}: its last line is torn: left out"]
    assert [second.ask() for _ in range(3)] == first.given[:3]
    assert second.all() == {"lora": 6}
    found = SearchFile.read(second.study)
    assert found is not None
    assert [point.fingerprint for point in found.asked] == [point.fingerprint for point in second.given]
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(BadInput, match=r"search\.jsonl, line 1: not a search \(variant"):
        Drive(tmp_path, space(variants=("lora",)))


def test_one_more_point_is_one_more_line(tmp_path: Path) -> None:
    drive = Drive(tmp_path, space())
    before = (drive.study / FILE).stat().st_ino, (drive.study / POINTS).stat().st_ino
    drive.all()
    assert before == ((drive.study / FILE).stat().st_ino, (drive.study / POINTS).stat().st_ino)
    assert len((drive.study / POINTS).read_bytes().splitlines()) == 12


def test_a_design_keeps_to_its_budget_when_another_variant_brings_a_dimension(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("full",)), points=16, sampler="qmc")
    assert len(first.ledger.asked) == 16
    second = Drive(tmp_path, space("rank=4,8", variants=("full", "lora")), points=32, sampler="qmc")
    assert second.ledger.counts == {"full": 32, "lora": 32}
    assert list(second.ledger.asked)[:16] == list(first.ledger.asked)


@pytest.mark.parametrize("sampler", ["qmc", "random"])
def test_a_design_is_trained_as_a_whole_and_a_larger_one_goes_on_from_it(
    tmp_path: Path, sampler: str
) -> None:
    few = Drive(tmp_path, space(), points=2, sampler=sampler)
    assert few.all() == {"lora": 2, "hira": 2}
    assert few.given == list(few.ledger.asked.values())
    many = Drive(tmp_path, space(), points=4, sampler=sampler)
    assert many.all() == {"lora": 2, "hira": 2}
    assert list(many.ledger.asked.values()) == [*few.given, *many.given]


def test_fewer_points_than_before_are_refused(tmp_path: Path) -> None:
    Drive(tmp_path, space(variants=("lora",)), points=16)
    with pytest.raises(BadInput, match=r"--points 8: .* asks for 16 .* take 16 or more") as caught:
        Drive(tmp_path, space(), points=8)
    assert "\n" not in str(caught.value)


def test_a_large_space_that_seemed_used_up_is_looked_through_again(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), points=2)
    first.ledger.exhaust("lora")
    assert Drive(tmp_path, space(variants=("lora",)), points=2).all() == {"lora": 2}


def test_tune_gets_no_pickle_of_it(tmp_path: Path) -> None:
    import pickle

    drive = Drive(tmp_path, space())
    drive.ask()
    folder = tmp_path / "tune"
    folder.mkdir()
    drive.search.save_to_dir(str(folder), "now")
    assert not list(folder.iterdir())
    assert len(pickle.dumps(drive.search)) < 200


def test_what_seats_of_a_killed_driver_have_written_meanwhile_is_known(tmp_path: Path) -> None:
    first = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    for _ in range(2):
        first.ask()
    second = Drive(tmp_path, space(variants=("lora",)), scheduler="asha")
    known: set[str] = set()  # run.py looked before the record was there
    second.store.put(record(first.given[1]))
    second.search = PerGroupSearch(second.ledger, second.store, "asha", 2, known)
    assert known == {first.given[1].fingerprint}
    assert [second.ask() for _ in range(2)] == [first.given[1], first.given[0]]
    assert Counter(t.state.name for t in second.told("lora")) == {"COMPLETE": 1, "RUNNING": 1}
