"""What the end of a study prints, and the adapters that `--save-adapters best` keeps until then."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from synthetic import record

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.sections import mlflow_command
from orchestrator.launch.reporting import AdapterKeeper, describe_failures, export_words
from orchestrator.record.schema import Record
from orchestrator.record.store import Store, adapter_file_name
from orchestrator.record.study_file import AnalysisSettings, StudyFile, lanes_of_others

LETTERS, DIGITS, FAILED = record(), record(task="digits"), record(task="digits", state="failed")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([LETTERS], [[]]),
        ([LETTERS, DIGITS], [["--task", "digits"], ["--task", "letters"]]),
        ([LETTERS, FAILED], [["--task", "letters"]]),
        ([FAILED], []),
    ],
)
def test_a_study_of_several_tasks_has_an_export_command_for_each(
    records: list[Record], expected: list[list[str]]
) -> None:
    """Without --task, `export` refuses such a study."""
    words = export_words(StudyFile("s", "", ""), records)
    assert words == [["export", "s", *each] for each in expected]


def test_failures_are_listed_once_for_each_reason() -> None:
    failed = [
        record(variant=name, state="failed", reason=reason, seed=seed)
        for seed, (name, reason) in enumerate(
            [("lora", "KeyError:\n 'g'"), ("dora", "KeyError: 'g'"), ("pissa", "x")]
        )
    ]
    first, second = describe_failures(failed, lambda *words: " ".join(words))
    assert first == f"  lora, dora: KeyError: 'g'; more: show {failed[0].fingerprint[:12]}"
    assert second == f"  pissa: x; more: show {failed[2].fingerprint[:12]}"
    many = [record(state="failed", reason=f"{seed} {'y' * 300}", seed=seed) for seed in range(7)]
    *lines, last = describe_failures(many, lambda *words: "")
    assert all("yyyy" in line for line in lines)
    assert last == "  and 2 more reasons, in the report"
    assert max(map(len, lines)) < 230


def test_mlflow_is_opened_with_one_worker_on_a_database_only() -> None:
    """A busy machine does not start its four workers within their time limit."""
    assert mlflow_command("sqlite:///a.db") == "mlflow ui --workers 1 --backend-store-uri sqlite:///a.db"
    assert mlflow_command("http://server:5000") == ""


SIZE = 100
SCORES = {1e-4: (0.2, 0.3), 1e-3: (0.9, 0.6), 1e-2: (0.8, 0.85), 1e-1: (None, 0.95)}
"""Rate -> validation scores of two seeds. The rate with the best single run is not the best rate."""


def records() -> list[Record]:
    return [
        record(variant, rate, seed, score)
        for variant in ("lora", "hira")
        for rate, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def write(store: Store, record: Record) -> None:
    """Write what a trainer writes before the record of a finished lane."""
    if record.state == "finished":
        folder = store.adapters / "best"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / adapter_file_name(record.fingerprint)).write_bytes(b"x" * SIZE)


def names(own: Iterable[Record]) -> set[str]:
    return {each.fingerprint for each in own}


def _point(own: Record) -> tuple[float, int]:
    return own.configuration.optimizer.learning_rate, own.configuration.seed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def kept(store: Store) -> set[str]:
    return {path.stem for path in store.best_adapters()}


BEST_FIRST = ((1e-2, 0), (1e-2, 1), (1e-3, 1), (1e-3, 0), (1e-4, 0), (1e-4, 1), (1e-1, 0), (1e-1, 1))
"""Rates and seeds in an order in which 1e-2 is the best rate from the first record on."""


@pytest.mark.parametrize("room", [0, 2 * SIZE, 100 * SIZE])
@pytest.mark.parametrize("order", [None, *range(3)])
def test_a_study_ends_with_the_best_run_of_the_best_point(store: Store, order: int | None, room: int) -> None:
    """With room for all points, in any order; with less room, if that point was the best from the start.

    Args:
        store: The store.
        order: Seed of a random order of the records; None for `BEST_FIRST`.
        room: The bytes of adapters that the running study may keep.
    """
    own = records()
    if order is None:
        own.sort(key=lambda each: BEST_FIRST.index(_point(each)))
    else:
        random.Random(order).shuffle(own)
    keeper = AdapterKeeper(store, AnalysisSettings())
    for each in own:
        write(store, each)
        keeper.keep_best([each], room)
        assert len(kept(store)) <= max(2, room // SIZE)
    best = [record(variant, 1e-2, 1, 0.85) for variant in ("lora", "hira")]
    keeper.keep_best(own)
    assert kept(store) <= names(best)
    if order is None or room > len(own) * SIZE:
        assert kept(store) == names(best)


def test_the_best_lanes_are_those_of_the_reports_best_rates() -> None:
    found = analyze(StudyFile("rates", "", ""), records())
    lanes = found.best_lanes.set_index("variant")["fingerprint"].to_dict()
    assert found.best.set_index("variant")["fingerprint"].to_dict() == lanes
    assert lanes == {v: record(v, 1e-2, 1, 0.85).fingerprint for v in ("lora", "hira")}


def test_every_run_of_a_replicated_study_is_a_point() -> None:
    study = StudyFile("tuned", "", "", settings=AnalysisSettings(kind="replicates"))
    own = [each for each in records() if each.configuration.variant.name == "lora"]
    (best,) = analyze(study, own).best_lanes["fingerprint"]
    assert best == record("lora", 1e-1, 1, 0.95).fingerprint


def test_an_adapter_of_a_trainer_whose_record_the_driver_has_not_seen_stays(store: Store) -> None:
    scores = {1e-3: 0.7, 1e-2: 0.8, 1e-1: 0.1}
    good, better, unseen = (record(rate=rate, validation=score) for rate, score in scores.items())
    keeper = AdapterKeeper(store, AnalysisSettings())
    for each in (good, better, unseen):
        write(store, each)
    keeper.keep_best([good], 100 * SIZE)
    keeper.keep_best([better], 100 * SIZE)
    assert unseen.fingerprint in kept(store)
    keeper.keep_best([good, better, unseen])
    assert kept(store) == names([better])


def test_the_lanes_of_other_studies_and_earlier_ones_are_not_removed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {rate: record(rate=rate, validation=rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1)}
    shared, reused, mine, best = (each.fingerprint for each in own.values())
    study = StudyFile("rates", "", "", (shared, reused, mine, best), reused=(reused,))
    study.write(tmp_path / "rates")
    StudyFile("other", "", "", (shared,)).write(tmp_path / "other")
    study.write(tmp_path / "a copy")
    for each in own.values():
        write(store, each)
    (tmp_path / "damaged").mkdir()
    damaged = tmp_path / "damaged" / "study.json"
    damaged.write_text("{")
    AdapterKeeper(store, AnalysisSettings(), lanes_of_others(tmp_path, study)).keep_best(own.values())
    assert kept(store) == {shared, reused, mine, best}, "the damaged study may share any lane"
    assert str(damaged) in caplog.text
    damaged.unlink()
    AdapterKeeper(store, AnalysisSettings(), lanes_of_others(tmp_path, study)).keep_best(own.values())
    assert kept(store) == {shared, reused, best}


def test_an_adapter_that_cannot_be_removed_does_not_end_the_study(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    worse, better = record(rate=1e-3, validation=0.1), record(rate=1e-2, validation=0.9)
    path = store.adapters / "best" / adapter_file_name(worse.fingerprint)
    path.mkdir(parents=True)  # A folder cannot be unlinked.
    AdapterKeeper(store, AnalysisSettings()).keep_best([worse, better])
    assert "is not removed" in caplog.text
